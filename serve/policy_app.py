"""Calling the policy application from the endpoint: its handle, whether it runs, and its answers item by item."""

import asyncio
from contextlib import suppress

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from sampo_ray.actors.policy.messages import (
    AnsweredBy,
    AnswerItem,
    Chunks,
    Failure,
    LivePosition,
    WeightsChanged,
    Whole,
)
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.errors import ApiError, ReplicaLost, from_engine, from_policy, unavailable

PATIENCE_S = 2.0
HANDLE_POLL_S = 0.5
STATUS_FRESH_S = 1.0
STATUS_TIMEOUT_S = 10.0


class PolicyApp:
    """A Serve application of policy replicas, by name; it may start, die and come back while this object lives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: DeploymentHandle | None = None
        self._status = CachedRead(lambda: asyncio.to_thread(self._look), STATUS_FRESH_S, STATUS_TIMEOUT_S)
        self.seen = LivePosition()
        """The latest position that an answer has had; no answer begins earlier."""

    async def handle(self, start_by: float) -> DeploymentHandle:
        """ApiError (503) when the application does not exist and is not deployed until `start_by` (event loop's
        clock).
        """
        while self._handle is None:
            try:
                self._handle = (await asyncio.to_thread(serve.get_app_handle, self._name)).options(stream=True)
            except (RayError, RayServeException):
                if asyncio.get_running_loop().time() > start_by:
                    raise unavailable() from None
                await asyncio.sleep(HANDLE_POLL_S)
        return self._handle

    async def is_up(self) -> bool:
        """Whether a replica runs, or Serve would start one. At most one look a second, for all callers together."""
        return (await self._up_and_runs())[0]

    async def runs(self) -> bool:
        """Whether a replica runs."""
        return (await self._up_and_runs())[1]

    def note(self, seen: AnsweredBy | WeightsChanged) -> None:
        """Notes weights of which a client has seen an answer."""
        before = self.seen.sequence if self.seen.run == seen.weights.run else 0
        self.seen = LivePosition(seen.weights.run, max(before, seen.sequence))

    async def _up_and_runs(self) -> tuple[bool, bool]:
        # While the controller restarts, replicas answer without it, and the last status still counts.
        with suppress(TimeoutError, RayError):
            return await self._status.get()
        return self._status.last or (False, False)

    def _look(self) -> tuple[bool, bool]:
        app = serve.status().applications.get(self._name)
        if app is None:
            return False, False
        runs = all(d.replica_states.get("RUNNING") for d in app.deployments.values())
        return runs or all(d.status == "HEALTHY" for d in app.deployments.values()), runs


class Answer:
    """The items of one streaming call, until `deadline` (event loop's clock). Its failures are ApiErrors.

    Serve cancels the call when the request that made it is cancelled (the client went away); this class does when the
    endpoint itself gives up.
    """

    def __init__(self, policy: PolicyApp, items: DeploymentResponseGenerator, deadline: float) -> None:
        self._policy, self._items, self._deadline = policy, items, deadline

    async def opened(self, start_by: float) -> AnsweredBy:
        """The weights that answer: a replica's first item, which it sends at once. Waits no longer than `start_by`
        (event loop's clock) for a replica to run.
        """
        first = asyncio.ensure_future(self._item())
        try:
            while not (await asyncio.wait({first}, timeout=PATIENCE_S))[0]:
                if asyncio.get_running_loop().time() > start_by and not await self._policy.runs():
                    self._items.cancel()
                    raise unavailable()
            answered_by = first.result()
            if not isinstance(answered_by, AnsweredBy):
                raise ReplicaLost()
            return answered_by
        finally:
            first.cancel()

    async def next(self) -> Chunks | Whole | None:
        """The next part of the answer; None at the end. Notes changed weights, and raises the engine's errors."""
        match await self._item():
            case WeightsChanged() as changed:
                self._policy.note(changed)
                return await self.next()
            case Failure(status, message, param):
                raise from_engine(status, message, param)
            case Chunks() | Whole() as content:
                return content
        return None

    async def _item(self) -> AnswerItem | None:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._items, None)
        except TimeoutError:
            self._items.cancel()
            raise ApiError(504, "the request took longer than this endpoint allows", code="timeout") from None
        except (RayError, RayServeException) as error:
            raise from_policy(error) from None
