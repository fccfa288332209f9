"""Rounds in, results out: the log through which the driver and the training ranks talk for the life of a driver.

The ranks live in one long Ray Train run; the loop hands it a round at a time. Entries are numbered; a rank asks for the
first one after the last it knows, with a limit and never inside a collective. Results are keyed by (entry, step) and
the first write wins, since a rank that came back from its checkpoint trains steps again that were reported already.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampo_ray.config.run import RunConfig
from sampo_ray.errors import TrainingError
from sampo_ray.run.parts import Part
from sampo_ray.run.storage import Place


@dataclass(frozen=True)
class Work:
    """One round for the ranks: where its pairs are, their lengths [pairs, 3], and the version it starts from."""

    run: str
    place: Place
    config: RunConfig
    round: int
    start_version: int
    steps: int
    parts: tuple[Part, ...]
    lengths: np.ndarray


class Exchange:
    """Async Ray actor; lives and dies with the driver, which posts again what is not committed when it comes back."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._entry: tuple[int, Work | None] = (0, None)
        self._results: dict[int, dict[str, Any]] = {}
        self._failure: str | None = None
        self._closed = False

    async def post(self, work: Work) -> int:
        """Makes a round the current entry and returns its number; the one before must be finished."""
        async with self._changed:
            number = self._entry[0] + 1
            self._entry, self._results = (number, work), {}
            self._changed.notify_all()
            return number

    async def close(self) -> None:
        """Tells the ranks that there is nothing more to come."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def take(self, after: int, timeout_s: float) -> tuple[int, Work] | str:
        """The current entry when it is newer than `after`; `"closed"`, or `"wait"` when `timeout_s` passed."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._closed or self._entry[0] > after), timeout_s
                )
            except TimeoutError:
                return "wait"
            number, work = self._entry
            return (number, work) if work is not None and number > after else "closed"

    async def report(self, number: int, step: int, result: dict[str, Any]) -> None:
        """A step's result, of the entry of that number."""
        async with self._changed:
            if number == self._entry[0]:
                self._results.setdefault(step, result)
            self._changed.notify_all()

    async def fail(self, reason: str) -> None:
        """Ends the training with a reason that the driver shows to the user."""
        async with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    async def results(self, after_step: int, timeout_s: float) -> list[dict[str, Any]]:
        """Results of the current entry beyond `after_step`, in order, as soon as there are any; empty after
        `timeout_s`.

        Raises TrainingError with the ranks' reason when they gave up.
        """
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._failure is not None or after_step + 1 in self._results),
                    timeout_s,
                )
            except TimeoutError:
                return []
            if self._failure is not None:
                raise TrainingError(self._failure)
            ready, step = [], after_step + 1
            while step in self._results:
                ready.append(self._results[step])
                step += 1
            return ready
