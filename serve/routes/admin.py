"""Routes for operators: which version is live, pinned or refused, and changing it."""

from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.responses import JSONResponse, Response

from sampo_ray.serve import errors
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.requests.json_body import read_json

MAX_BODY_BYTES = 4096
Name = Annotated[str, StringConstraints(min_length=1, max_length=80)]


class Command(BaseModel):
    """Body of an admin request: a version by number or label, and for `label` the new one."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=0, lt=10**12)] | Name | None = None
    label: Name | None = None


class AdminRoutes:
    """Handlers of `/admin/...`; the class that has them brings a `catalogue`, and hears of what was changed."""

    catalogue: Catalogue

    def commanded(self, state: dict[str, Any]) -> None:
        """What is live may be another version now, as `state` (of the catalogue) says."""

    async def admin_versions(self) -> Response:
        return JSONResponse(_view(await self.catalogue.state()))

    async def admin_promote(self, request: Request) -> Response:
        return await self._command(request, "promote")

    async def admin_rollback(self, request: Request) -> Response:
        return await self._command(request, "rollback")

    async def admin_pin(self, request: Request) -> Response:
        return await self._command(request, "pin")

    async def admin_unpin(self, request: Request) -> Response:
        return await self._command(request, "unpin")

    async def admin_label(self, request: Request) -> Response:
        return await self._command(request, "label")

    async def _command(self, request: Request, verb: str) -> Response:
        try:
            command = Command.model_validate(await read_json(request, MAX_BODY_BYTES))
        except ValidationError as error:
            raise errors.from_validation(error) from None
        if verb != "rollback" and command.version is None:
            raise errors.ApiError(400, "version: missing; name a version by number or label", param="version")
        if verb == "label" and command.label is None:
            raise errors.ApiError(400, "label: missing; name the new label", param="label")
        version = "" if command.version is None else str(command.version)
        state = await self.catalogue.command(verb, version, command.label or "")
        self.commanded(state)
        return JSONResponse(_view(state))


ADMIN_ROUTES: dict[str, Any] = {
    "admin_versions": lambda app: app.get("/admin/versions"),
    "admin_promote": lambda app: app.post("/admin/promote"),
    "admin_rollback": lambda app: app.post("/admin/rollback"),
    "admin_pin": lambda app: app.post("/admin/pin"),
    "admin_unpin": lambda app: app.post("/admin/unpin"),
    "admin_label": lambda app: app.post("/admin/label"),
}


def _view(state: dict[str, Any]) -> dict[str, Any]:
    serving = state["serving"]
    served = {name: getattr(serving, name) for name in ("follow", "held", "live")}
    previous = serving.previous[-1] if serving.previous else None
    pinned, versions = serving.all_pinned, [entry.listed() for entry in state["versions"]]
    return {"run": state["run"], **served, "pinned": pinned, "previous": previous, "versions": versions}
