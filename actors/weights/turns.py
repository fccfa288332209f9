"""Whose turn it is on GPUs that engines and training ranks share by time, and whether the others have made room."""

import asyncio
import time
from contextlib import suppress
from typing import Literal

Turn = Literal["engines", "ranks"]

LOOK_S = 0.5
SILENT_S = 30.0
"""An engine that has not asked for so long has no process any more; it asks every few seconds."""


class GpuTurns:
    """Which replicas use GPUs, by what they say when they ask; all times in seconds of one clock.

    A replica counts from the answer that allows it to until it says that its engine sleeps, or is silent for SILENT_S.
    Who used GPUs before this object was made, at `since`, is known after SILENT_S.
    """

    def __init__(self, turn: Turn, since: float) -> None:
        self.turn: Turn = turn
        self._since, self._using = since, dict[str, float]()

    def ask(self, replica: str, sleeps: bool, now: float) -> Turn:
        """Whose turn it is. A replica whose engine `sleeps` and that hears "engines" may wake it."""
        if self.turn == "engines" or not sleeps:
            self._using[replica] = now
        else:
            self._using.pop(replica, None)
        return self.turn

    def are_free(self, now: float) -> bool:
        """Whether it is the ranks' turn and no engine uses a GPU."""
        seen = (self._since, *self._using.values())
        return self.turn == "ranks" and all(now - when > SILENT_S for when in seen)


class SharedGpus:
    """The calls of a weight store about GPUs that are shared by time."""

    def __init__(self, turn: Turn = "engines") -> None:
        self._turns, self._changed = GpuTurns(turn, time.monotonic()), asyncio.Condition()

    @property
    def turn(self) -> Turn:
        return self._turns.turn

    async def ask(self, replica: str, sleeps: bool, timeout_s: float) -> Turn:
        """See `GpuTurns.ask`; waits for up to `timeout_s` as long as the replica has nothing to do."""
        async with self._changed:
            self._turns.ask(replica, sleeps, time.monotonic())
            self._changed.notify_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: (self.turn == "ranks") != sleeps)
            return self._turns.ask(replica, sleeps, time.monotonic())

    async def give(self, turn: Turn, timeout_s: float) -> bool:
        """Gives the GPUs to engines or ranks; whether the ranks, if they are meant, have them within `timeout_s`."""
        async with self._changed:
            self._turns.turn = turn
            self._changed.notify_all()
        until = time.monotonic() + timeout_s
        while turn == "ranks" and not self._turns.are_free(time.monotonic()):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(LOOK_S)
        return True
