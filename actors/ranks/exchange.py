"""Rounds in, results out: the log through which the driver and the training ranks talk for the life of a driver.

The ranks live in one long Ray Train run; the loop hands it a round at a time. Entries are numbered; a rank asks for the
first one after the last it knows, with a limit and never inside a collective. Results are keyed by (entry, step) and
the first write wins, since a rank that came back from its checkpoint trains steps again that were reported already.
"""

import asyncio
import itertools
from dataclasses import dataclass

import numpy as np

from sampo_ray.config.run import RunConfig
from sampo_ray.errors import TrainingError
from sampo_ray.run.parts import Part
from sampo_ray.run.steps import StepResult
from sampo_ray.run.storage import Place


@dataclass(frozen=True)
class RoundSpec:
    """What the ranks need of a round: where its pairs are, their lengths [pairs, 3], and the version it starts from."""

    run: str
    place: Place
    config: RunConfig
    round: int
    start_version: int
    steps: int
    parts: tuple[Part, ...]
    lengths: np.ndarray


@dataclass(frozen=True)
class Entry:
    """A round that was posted, and its number in the log."""

    number: int
    spec: RoundSpec


class Closed:
    """The driver posts no more rounds."""


class Exchange:
    """Async Ray actor; lives and dies with the driver, which posts again what is not committed when it comes back."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._entry: Entry | None = None
        self._results: dict[int, StepResult] = {}
        self._failure: str | None = None
        self._closed = False

    async def post(self, spec: RoundSpec) -> None:
        """Makes a round the current entry; the one before must be finished."""
        async with self._changed:
            self._entry, self._results = Entry(self._number + 1, spec), {}
            self._changed.notify_all()

    async def close(self) -> None:
        """Tells the ranks that there is nothing more to come."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def take(self, after: int, timeout_s: float) -> Entry | Closed | None:
        """The current entry once its number is above `after`; None when there is none within `timeout_s`."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._closed or self._number > after), timeout_s)
            except TimeoutError:
                return None
            return self._entry if self._number > after else Closed()

    async def report(self, number: int, result: StepResult) -> None:
        """Adds a step's result to the entry of that number."""
        async with self._changed:
            if number == self._number:
                self._results.setdefault(result.metrics.step, result)
            self._changed.notify_all()

    async def fail(self, reason: str) -> None:
        """Ends the training with a reason that the driver shows to the user."""
        async with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    async def results(self, after_step: int, timeout_s: float) -> list[StepResult]:
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
            steps = itertools.takewhile(lambda step: step in self._results, itertools.count(after_step + 1))
            return [self._results[step] for step in steps]

    @property
    def _number(self) -> int:
        return self._entry.number if self._entry else 0
