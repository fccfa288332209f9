"""Which versions the endpoint has, and which application answers for a model name."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from sampo_ray.actors.policy.messages import LivePosition
from sampo_ray.actors.weights.client import CommandAnswer, StoreState, find_weight_store
from sampo_ray.actors.weights.pinned import pinned_app, pins_of
from sampo_ray.errors import VersionError
from sampo_ray.run.commands import Command
from sampo_ray.run.report import PinName
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import adapter_model, find
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.errors import ApiError, unavailable

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files

MODEL = "policy"
FRESH_S = 1.0
CALL_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 60.0
ID_HEADER = "Idempotency-Key"


@dataclass(frozen=True)
class Target:
    """Who answers for a model name: an application, its engine's name for the model, and a version that it must hold to
    be right (None: whatever is live). `position`: of a version that is live, from when on; replicas may be behind."""

    app: str
    engine_model: str
    version: int | None
    position: LivePosition | None = None


class Catalogue:
    """The weight store's view of the run, at most FRESH_S old; while the store is away, what it said last."""

    def __init__(self, policy_app: str, store: str) -> None:
        self._policy_app, self._store = policy_app, store
        self._state = CachedRead(self._ask, FRESH_S, CALL_TIMEOUT_S)
        self._place = ""
        self._created = int(time.time())

    async def state(self) -> StoreState:
        """ApiError (503) when there has been no answer yet."""
        try:
            return await self._state.get()
        except (RayError, ValueError, TimeoutError):  # it restarts, or is not there yet
            if self._state.last is None:
                raise unavailable() from None
            return self._state.last

    async def run_place(self) -> Place:
        """The fleet's run directory; while the store is away, the last one. ApiError (503) when there is none."""
        try:
            self._place = await asyncio.wait_for(find_weight_store(self._store).place.remote(), CALL_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError):
            logger.info("the weight store does not say which run it works for just now")
        if not self._place:
            raise unavailable("no run is attached to this endpoint yet; try again soon")
        return Place(self._place)

    async def command(self, command: Command, id: str) -> CommandAnswer:
        """Carries out an admin's command, unless that of this id has been carried out. ApiError when it cannot be, and
        when there is no answer in time: then it may be carried out yet, and may be sent again with the same id."""
        try:
            asked = find_weight_store(self._store).command.remote(command, id)
            answer: CommandAnswer = await asyncio.wait_for(asked, COMMAND_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, VersionError):
                raise ApiError(409, str(error.cause), param="version", code="version_refused") from None
            raise _unanswered(id) from None
        except (RayError, ValueError, TimeoutError):
            raise _unanswered(id) from None
        self._state.set(answer.state)
        return answer

    async def target(self, model: str | None) -> Target:
        """ApiError (404) for a name that is not served; it lists what is."""
        live = Target(self._policy_app, MODEL, None)
        if model in (None, MODEL):
            return live
        base, _, name = str(model).partition("@")
        state = await self.state()
        serving, pins = state.serving, pins_of(state.serving)

        def app_of(pinned: PinName) -> str:
            _require_up(pinned, state)
            return pinned_app(state.apps, state.run, pins[pinned])

        if base == MODEL and name in serving.named_adapters:
            adapter = serving.named_adapters[name]
            return Target(app_of(name), adapter_model(name, adapter.content), adapter.base)
        version = _find(str(model), state)
        is_live = version == serving.live
        if version in pins and not (is_live and state.pin(version).state != "pinned"):
            return Target(app_of(version), f"{MODEL}@{version}", version)
        if is_live:
            return Target(self._policy_app, MODEL, version, LivePosition(state.run, serving.sequence))
        raise _no_model(f"version {version} is kept but not pinned; an admin can pin it", state)

    async def cards(self) -> list[dict[str, Any]]:
        """OpenAI's model cards of what answers: the live policy, versions that are live or pinned, newest first, and
        adapters."""
        state = await self.state()
        about = {entry.version: {"run": state.run, **entry.listed()} for entry in state.versions}
        up = [version for version, each in about.items() if each["state"] in ("live", "pinned")]
        live = [self._card(MODEL, about[version]) for version in up if version == state.serving.live]
        versions = [self._card(f"{MODEL}@{version}", about[version]) for version in up]
        adapters = [
            self._card(f"{MODEL}@{name}", {**about[adapter.base], "adapter": name, "state": "pinned"})
            for name, adapter in state.serving.named_adapters.items()
            if adapter.base in about and state.pin(name).state == "pinned"
        ]
        return [*live, *versions, *adapters]

    async def card(self, model: str) -> dict[str, Any]:
        """The card of a model that answers, by a label too. ApiError (404) for another name, and 503 for one that does
        not answer yet."""
        state = await self.state()
        await self.target(model)
        name = model.partition("@")[2]
        if name and name not in state.serving.adapters:
            name = str(_find(model, state))
        wanted = f"{MODEL}@{name}" if name else MODEL
        for card in await self.cards():
            if card["id"] == wanted:
                return card
        raise unavailable()  # nothing is live yet, or the version starts

    def _card(self, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        created = metadata.get("created") or self._created
        return {"id": name, "object": "model", "created": created, "owned_by": "sampo-ray", "metadata": metadata}

    async def _ask(self) -> StoreState:
        return await asyncio.wait_for(find_weight_store(self._store).state.remote(), CALL_TIMEOUT_S)


def served_names(state: StoreState) -> list[str]:
    """The model names that a request may use now, by number and by label."""
    serving = state.serving
    names = [MODEL]
    for entry in state.versions:
        if entry.state in ("live", "pinned"):
            names += [f"{MODEL}@{name}" for name in (entry.version, *entry.labels)]
    up = [name for name in serving.named_adapters if state.pin(name).state == "pinned"]
    return [*names, *(f"{MODEL}@{name}" for name in up)]


def _require_up(name: PinName, state: StoreState) -> None:
    """ApiError (503) when the application of a pinned version or an adapter fails; one that starts is waited for."""
    if state.pin(name).state == "failing":
        what = "adapter" if isinstance(name, str) else "version"
        raise unavailable(f"{what} {name} is pinned, but does not start; an admin finds why in /admin/versions")


def _unanswered(id: str) -> ApiError:
    return unavailable(f"the command may not have been carried out; send it again, with the header {ID_HEADER}: {id}")


def _find(model: str, state: StoreState) -> int:
    try:
        if not model.startswith(f"{MODEL}@"):
            raise VersionError("no model of that name")
        return find(model.partition("@")[2], state.labels)
    except VersionError as error:
        raise _no_model(str(error), state) from None


def _no_model(reason: str, state: StoreState) -> ApiError:
    message = f"model: {reason}; this endpoint serves {', '.join(served_names(state))}"
    return ApiError(404, message, param="model", code="model_not_found")
