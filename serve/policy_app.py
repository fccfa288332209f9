"""Calling the policy application from the endpoint: its handle, whether it runs, and its answers item by item."""

import asyncio
import time
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from sampo_ray.actors.weights import WeightsId
from sampo_ray.serve.errors import ApiError, from_policy, unavailable

PATIENCE_S = 2.0
STATUS_FRESH_S = 1.0
STATUS_TIMEOUT_S = 10.0


class PolicyApp:
    """A Serve application of policy replicas, by name; it may start, die and come back while this object lives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: DeploymentHandle | None = None
        self._up, self._looked, self._looking = False, -STATUS_FRESH_S, asyncio.Lock()

    def handle(self) -> DeploymentHandle:
        """ApiError (503) when the application does not exist."""
        if self._handle is None:
            try:
                self._handle = serve.get_app_handle(self._name).options(stream=True)
            except (RayError, RayServeException):
                raise unavailable() from None
        return self._handle

    async def is_up(self) -> bool:
        """Whether a replica runs, or Serve would start one. At most one look a second, for all callers together."""
        async with self._looking:
            if time.monotonic() - self._looked >= STATUS_FRESH_S:
                # While the controller restarts, replicas answer without it, and what was seen last still counts.
                with suppress(TimeoutError, RayError):
                    self._up = await asyncio.wait_for(asyncio.to_thread(self._look), STATUS_TIMEOUT_S)
                self._looked = time.monotonic()
        return self._up

    async def weights(self) -> dict[str, Any]:
        """What one replica holds: run, version, round, step."""
        if not await self.is_up():
            raise unavailable()
        try:
            return await asyncio.wait_for(self.handle().options(stream=False).weights.remote(), STATUS_TIMEOUT_S)
        except TimeoutError:
            raise unavailable() from None
        except (RayError, RayServeException) as error:
            raise from_policy(error) from None

    def _look(self) -> bool:
        app = serve.status().applications.get(self._name)
        if app is None:
            return False
        return all(d.status == "HEALTHY" or "RUNNING" in d.replica_states for d in app.deployments.values())


class Answer:
    """The items of one streaming call, until `deadline` (event loop's clock). Its failures are ApiErrors.

    Serve cancels the call when the request that made it is cancelled (the client went away); this class does when the
    endpoint itself gives up.
    """

    def __init__(self, items: DeploymentResponseGenerator, deadline: float) -> None:
        self._items, self._deadline = items, deadline

    async def opened(self, policy: PolicyApp) -> WeightsId:
        """The weights that answer: a replica's first item, at once. Gives up early when there is no replica."""
        first = asyncio.ensure_future(self.next())
        try:
            while not (await asyncio.wait({first}, timeout=PATIENCE_S))[0]:
                if not await policy.is_up():
                    self._items.cancel()
                    raise unavailable()
            return first.result()
        finally:
            first.cancel()

    async def next(self) -> Any:
        """The next item; None at the end."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._items, None)
        except TimeoutError:
            self._items.cancel()
            raise ApiError(504, "the request took longer than this endpoint allows", code="timeout") from None
        except (RayError, RayServeException) as error:
            raise from_policy(error) from None
