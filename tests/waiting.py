"""How long tests wait.

A limit ends a test that hangs; it says nothing of how fast anything is. Limits are written for two idle cores, and
`scaled` by how much longer a known piece of work takes on this machine, as busy as it is.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

TEST_S = 600.0
"""Limit of a test with the fixtures that it starts."""
KNOWN_WORK_S = 0.3
"""What `known_work` takes on two idle cores."""
FRESH_S = 30.0


def known_work() -> float:
    """Seconds in which a new process imports numpy and counts."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import numpy; sum(i * i for i in range(3_000_000))"], check=True)
    return time.monotonic() - begun


class Slowness:
    """How many times as long as on two idle cores things take here: the most that was seen, and at least 1."""

    def __init__(self, work: Callable[[], float] = known_work, clock: Callable[[], float] = time.monotonic) -> None:
        self._work, self._clock = work, clock
        self._looked = -FRESH_S - 1
        self.factor = 1.0

    def look(self) -> None:
        """Measures again, unless it was measured within FRESH_S."""
        if self._clock() - self._looked > FRESH_S:
            self.factor = max(self.factor, self._work() / KNOWN_WORK_S)
            self._looked = self._clock()


SLOWNESS = Slowness()


def scaled(seconds: float) -> float:
    """A limit of so many seconds on two idle cores, for this machine."""
    return seconds * SLOWNESS.factor


def wait_until(true: Callable[[], object], what: str, seconds: float = 120.0, every: float = 0.05) -> None:
    """Returns once `true()` is. AssertionError if it is not within the scaled limit."""
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > scaled(seconds):
            SLOWNESS.look()  # the machine may have become busy meanwhile
            assert time.monotonic() - begun < scaled(seconds), f"no {what} within {scaled(seconds):.0f} s"
        time.sleep(every)


async def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Returns once `true()` is, which takes moments. AssertionError if it is not within the scaled limit."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < scaled(seconds)
        await asyncio.sleep(0.005)


def hurry_duties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pauses of a weight store's duties short."""
    for name, seconds in (("FIRST_PAUSE_S", 0.01), ("LONGEST_PAUSE_S", 0.05), ("SOON_S", 0.01)):
        monkeypatch.setattr(f"sampo_ray.actors.weights.duty.{name}", seconds)
