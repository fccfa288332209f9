"""Who takes part in sending a version: the roll that the weight store keeps for a transport (`transport.py`).

A replica is on the roll from the first time it enlists. The trainer offers a version when it publishes it, musters
those who come for it, and calls them with tickets; each reports how it went. Whoever does not come or does not succeed
is off the roll, gets the version by the host path, and comes back under a new id. Nothing here waits without a limit.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sampo_ray.run.version_folders import WeightsId


@dataclass(frozen=True)
class Member:
    """A replica of `workers` workers that follows `channel`. The id is made anew each time it comes back."""

    id: str
    workers: int
    channel: str


@dataclass(frozen=True)
class Epoch:
    """Members between whom one process group holds. The number is another one once somebody came, went or failed."""

    number: int
    members: tuple[Member, ...]

    @property
    def world(self) -> int:
        """Ranks of the group: the trainer's, which is 0, and those of all workers."""
        return 1 + sum(member.workers for member in self.members)


@dataclass(frozen=True)
class Ticket:
    """What a member needs to receive one version: its ranks in the epoch from `rank` on, and the transport's `details`.

    `limit_s`: seconds that all of it may take. Plain values, since it goes to an engine's workers as a dict.
    """

    version: int
    epoch: int
    rank: int
    world: int
    limit_s: float
    details: dict[str, Any]


class Roll:
    """Pure bookkeeping on one event loop; `wanted(channel)` says which weights a channel's replicas will come for."""

    def __init__(self, wanted: Callable[[str], WeightsId | None]) -> None:
        self._wanted = wanted
        self._members: dict[str, Member] = {}
        self._offered: WeightsId | None = None
        self._ready: dict[str, Member] = {}
        self._epoch = Epoch(0, ())
        self._tickets: dict[str, Ticket] | None = None
        self._pending: set[str] = set()
        self._changed = asyncio.Condition()

    async def offer(self, weights: WeightsId | None) -> None:
        """These weights will be sent, and no others any more; said before they are announced. None: nothing is sent."""
        self._offered, self._ready, self._tickets, self._pending = weights, {}, None, set()
        await self._notify()

    async def enlist(self, member: Member, weights: WeightsId, timeout_s: float) -> Ticket | None:
        """Puts a replica on the roll and waits for its ticket for these weights; None: they will not be sent to it."""
        self._members[member.id] = member
        if weights != self._offered or self._tickets is not None:
            return None
        self._ready[member.id] = member
        await self._notify()
        await self._until(lambda: weights != self._offered or self._tickets is not None, timeout_s)
        if weights == self._offered and self._tickets is not None:
            return self._tickets.get(member.id)
        self._ready.pop(member.id, None)
        return None

    async def muster(self, weights: WeightsId, timeout_s: float) -> Epoch | None:
        """Waits for those on the roll who want what is offered, and strikes off those who do not come.

        None, and nothing is offered any more, when nobody comes.
        """
        if weights != self._offered:
            return None

        def late() -> list[str]:
            members = self._members.values()
            return [m.id for m in members if m.id not in self._ready and self._wanted(m.channel) == weights]

        await self._until(lambda: not late(), timeout_s)
        if weights != self._offered:
            return None
        for member in late():
            del self._members[member]
        members = tuple(self._ready.values())
        if members and set(members) != set(self._epoch.members):
            self._epoch = Epoch(self._epoch.number + 1, members)
        if not members:
            await self.offer(None)
        return self._epoch if members else None

    async def call(self, weights: WeightsId, limit_s: float, details: dict[str, Any]) -> None:
        """Gives the mustered their tickets."""
        if weights != self._offered:
            return
        rank, self._tickets = 1, {}
        for member in self._epoch.members:
            self._tickets[member.id] = Ticket(
                weights.version, self._epoch.number, rank, self._epoch.world, limit_s, details
            )
            rank += member.workers
        self._pending = set(self._tickets)
        await self._notify()

    async def report(self, member: str, succeeded: bool) -> None:
        """How it went for a member. One that failed, or goes, is off the roll, which ends the epoch."""
        self._pending.discard(member)
        if not succeeded:
            self._strike([member])
        await self._notify()

    async def close(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]:
        """Ends the sending once all have reported, or at once if it failed; returns the ids of those who have not.

        They are off the roll, as one of them may be why it failed.
        """
        if weights != self._offered:
            return []
        if succeeded:
            await self._until(lambda: not self._pending, timeout_s)
            if weights != self._offered:
                return []
        else:
            self._epoch = Epoch(self._epoch.number, ())
        silent = list(self._pending)
        self._strike(silent)
        await self.offer(None)
        return silent

    def _strike(self, members: list[str]) -> None:
        for member in members:
            self._members.pop(member, None)
            if any(member == other.id for other in self._epoch.members):
                self._epoch = Epoch(self._epoch.number, ())

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
