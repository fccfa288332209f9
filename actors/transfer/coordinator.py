"""Who takes part in sending a version by a transport (`transport.py`); kept by the weight store.

A replica is known from the first time it joins. The trainer offers a version when it publishes it, gathers the replicas
that join for it, and starts the transfer by giving each a plan; each reports its result. A replica that does not join
or does not succeed is removed, gets the version by the host path, and joins again under a new id. Every wait has a
limit.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sampo_ray.run.versions import WeightsId


@dataclass(frozen=True)
class ReceivingReplica:
    """A replica of `workers` workers that follows `channel`. Its id is new each time it comes back after a failure."""

    id: str
    workers: int
    channel: str


@dataclass(frozen=True)
class TransferGroup:
    """The replicas that share a process group with the trainer; `number` changes when one joins, leaves or fails."""

    number: int
    replicas: tuple[ReceivingReplica, ...]

    @property
    def world(self) -> int:
        """Ranks of the group: the trainer's, which is 0, and those of all workers."""
        return 1 + sum(replica.workers for replica in self.replicas)


@dataclass(frozen=True)
class TransferPlan:
    """What a replica needs to receive one version. Its workers have the ranks of the group from `rank` on.

    `limit_s`: seconds that all of it may take. `details`: the transport's, a TypedDict: workers get the plan as a dict.
    """

    version: int
    group: int
    rank: int
    world: int
    limit_s: float
    details: Any


class TransferCoordinator:
    """Pure bookkeeping on one event loop. `wanted(channel)` says which weights a channel's replicas will join for."""

    def __init__(self, wanted: Callable[[str], WeightsId | None]) -> None:
        self._wanted = wanted
        self._replicas: dict[str, ReceivingReplica] = {}
        self._offered: WeightsId | None = None
        self._joined: dict[str, ReceivingReplica] = {}
        self._group = TransferGroup(0, ())
        self._plans: dict[str, TransferPlan] | None = None
        self._pending: set[str] = set()
        self._changed = asyncio.Condition()

    async def offer(self, weights: WeightsId | None) -> None:
        """From now on these weights, and no others, will be sent; None: nothing is. Comes before they are announced."""
        self._offered, self._joined, self._plans, self._pending = weights, {}, None, set()
        await self._notify()

    async def join(self, replica: ReceivingReplica, weights: WeightsId, timeout_s: float) -> TransferPlan | None:
        """Waits for the plan by which a replica receives these weights; None: they will not be sent to it."""
        self._replicas[replica.id] = replica
        if weights != self._offered or self._plans is not None:
            return None
        self._joined[replica.id] = replica
        await self._notify()
        await self._until(lambda: weights != self._offered or self._plans is not None, timeout_s)
        if weights == self._offered and self._plans is not None:
            return self._plans.get(replica.id)
        self._joined.pop(replica.id, None)
        return None

    async def gather(self, weights: WeightsId, timeout_s: float) -> TransferGroup | None:
        """Waits for all known replicas that want the offered weights, and removes those that do not join in time.

        None, and nothing is offered any more, when no replica joins.
        """
        if weights != self._offered:
            return None

        def missing() -> list[str]:
            known = self._replicas.values()
            return [r.id for r in known if r.id not in self._joined and self._wanted(r.channel) == weights]

        await self._until(lambda: not missing(), timeout_s)
        if weights != self._offered:
            return None
        for replica in missing():
            del self._replicas[replica]
        replicas = tuple(self._joined.values())
        if replicas and set(replicas) != set(self._group.replicas):
            self._group = TransferGroup(self._group.number + 1, replicas)
        if not replicas:
            await self.offer(None)
        return self._group if replicas else None

    async def start(self, weights: WeightsId, limit_s: float, details: object) -> None:
        """Gives each replica of the group its plan."""
        if weights != self._offered:
            return
        group, rank, self._plans = self._group, 1, {}
        for each in group.replicas:
            self._plans[each.id] = TransferPlan(weights.version, group.number, rank, group.world, limit_s, details)
            rank += each.workers
        self._pending = set(self._plans)
        await self._notify()

    async def report(self, replica: str, succeeded: bool) -> None:
        """Notes a replica's result. One that failed, or ends, is removed, which ends the group."""
        self._pending.discard(replica)
        if not succeeded:
            self._remove([replica])
        await self._notify()

    async def finish(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]:
        """Ends the transfer once all have reported, or at once if it failed; removes the others; returns their ids."""
        if weights != self._offered:
            return []
        if succeeded:
            await self._until(lambda: not self._pending, timeout_s)
            if weights != self._offered:
                return []
        else:
            self._group = TransferGroup(self._group.number, ())
        silent = list(self._pending)
        self._remove(silent)
        await self.offer(None)
        return silent

    def _remove(self, replicas: list[str]) -> None:
        for replica in replicas:
            self._replicas.pop(replica, None)
            if any(replica == other.id for other in self._group.replicas):
                self._group = TransferGroup(self._group.number, ())

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
