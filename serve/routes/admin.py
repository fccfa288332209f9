"""Routes for operators: they list versions and change which are live, pinned or labelled."""

from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.responses import JSONResponse, Response

from sampo_ray.actors.weights.client import StoreState
from sampo_ray.run import commands
from sampo_ray.serve import errors
from sampo_ray.serve.catalogue import ID_HEADER, Catalogue
from sampo_ray.serve.requests.json_body import read_json

MAX_BODY_BYTES = 4096
Name = Annotated[str, StringConstraints(min_length=1, max_length=80)]


class Body(BaseModel):
    """Body of an admin request: a version by number or label and, to label it, the new label."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=0, lt=10**12)] | Name | None = None
    label: Name | None = None


class AdminRoutes:
    """Handlers of `/admin/...`. The class that has them sets `catalogue`; `commanded` is called after each command."""

    catalogue: Catalogue

    def commanded(self, state: StoreState) -> None:
        """Another version may be live from now on."""

    async def admin_versions(self) -> Response:
        return JSONResponse(_view(await self.catalogue.state()))

    async def admin_promote(self, request: Request) -> Response:
        return await self._command(request, commands.Promote(_version(await _body(request))))

    async def admin_rollback(self, request: Request) -> Response:
        await _body(request)
        return await self._command(request, commands.Rollback())

    async def admin_pin(self, request: Request) -> Response:
        return await self._command(request, commands.Pin(_version(await _body(request))))

    async def admin_unpin(self, request: Request) -> Response:
        return await self._command(request, commands.Unpin(_version(await _body(request))))

    async def admin_label(self, request: Request) -> Response:
        body = await _body(request)
        version = _version(body)
        if body.label is None:
            raise errors.ApiError(400, "label: missing; name the new label", param="label")
        return await self._command(request, commands.Label(version, body.label))

    async def _command(self, request: Request, command: commands.Command) -> Response:
        answer = await self.catalogue.command(command, _command_id(request))
        self.commanded(answer.state)
        done = {"id": answer.done.id, "live": answer.done.live, "repeated": answer.repeated}
        headers = {ID_HEADER: answer.done.id, **({"Idempotent-Replayed": "true"} if answer.repeated else {})}
        return JSONResponse({**_view(answer.state), "command": done}, headers=headers)


ADMIN_ROUTES: dict[str, Any] = {
    "admin_versions": lambda app: app.get("/admin/versions"),
    "admin_promote": lambda app: app.post("/admin/promote"),
    "admin_rollback": lambda app: app.post("/admin/rollback"),
    "admin_pin": lambda app: app.post("/admin/pin"),
    "admin_unpin": lambda app: app.post("/admin/unpin"),
    "admin_label": lambda app: app.post("/admin/label"),
}


async def _body(request: Request) -> Body:
    try:
        return Body.model_validate(await read_json(request, MAX_BODY_BYTES))
    except ValidationError as error:
        raise errors.from_validation(error) from None


def _command_id(request: Request) -> str:
    """The id of a command: the client's, who sends it again with the same one, or a new one."""
    id = request.headers.get(ID_HEADER, "").strip('"')
    if id and not commands.COMMAND_ID.fullmatch(id):
        raise errors.ApiError(400, f"{ID_HEADER}: use up to 100 letters, digits and ._:+/=@-", param=ID_HEADER)
    return id or commands.new_id()


def _version(body: Body) -> str:
    if body.version is None:
        raise errors.ApiError(400, "version: missing; name a version by number or label", param="version")
    return str(body.version)


def _view(state: StoreState) -> dict[str, object]:
    serving = state.serving
    return {
        "run": state.run,
        "follow": serving.follow,
        "held": serving.held,
        "live": serving.live,
        "pinned": serving.all_pinned,
        "adapters": [{"name": name, "base": each.base} for name, each in serving.named_adapters.items()],
        "previous": serving.previous[-1] if serving.previous else None,
        "versions": [entry.listed() for entry in state.versions],
        "pins": {version: pin.model_dump() for version, pin in state.pins.items()},
        "troubles": [trouble.model_dump() for trouble in state.troubles],
    }
