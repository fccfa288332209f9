"""Passes rounds from the driver to the training ranks, and the results of their steps back.

The ranks live in one long Ray Train run; the loop posts a round at a time. Rounds are numbered; a rank takes the first
one after the last it has, with a time limit and never inside a collective. The first result of a step counts, since
ranks that went back to a checkpoint train steps again that were reported already.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import ray

from sampo_ray.config.run import RunConfig
from sampo_ray.errors import TrainingError
from sampo_ray.run.manifest import StepResult, Stored
from sampo_ray.run.parts import Part, part_place, parts_of
from sampo_ray.run.storage import Place

EXCHANGE_ANSWER_S = 60.0
"""For any call of the exchange; those that wait for something return sooner."""


@dataclass(frozen=True)
class RoundSpec:
    """What the ranks need of a round: where its pairs are, their `Lengths`, and the version it starts from.

    `in_order`: the pairs of later epochs are parts of their own, in the order of the epoch.
    """

    run: str
    place: Place
    config: RunConfig
    round: int
    start_version: int
    steps: int
    parts: tuple[Part, ...]
    lengths: ray.ObjectRef
    in_order: bool = False

    @property
    def scored_by_ranks(self) -> bool:
        """Whether the ranks compute the reference log-probs that the loss needs."""
        return self.config.method.needs_reference and not self.config.reference_workers

    @property
    def stored(self) -> list[Part]:
        """The pairs as they are stored, with reference log-probs: those that the ranks compute are there by then."""
        if not self.scored_by_ranks:
            return list(self.parts)
        return parts_of(self.references, [part.rows for part in self.parts])

    @property
    def references(self) -> Place:
        """Where the ranks write pairs with reference log-probs."""
        return self.place.at("rounds", str(self.round), "reference")

    @property
    def epochs(self) -> Place:
        """Where the parts of later epochs are."""
        return self.place.at("rounds", str(self.round), "epochs")

    def epoch_part(self, epoch: int, index: int) -> Part:
        """Of the pairs in the order of a later epoch: as many in each part as in those that are stored."""
        return Part(part_place(self.epochs.at(str(epoch)), index), self.parts[index].rows)


@dataclass(frozen=True)
class Posted:
    """A round that was posted, and its number."""

    number: int
    spec: RoundSpec


@dataclass(frozen=True)
class RankFailure:
    """Why a rank failed, for the user. `lasting`: it would fail again in the same way if it were tried again."""

    reason: str
    lasting: bool


class Closed:
    """The driver posts no more rounds."""


class Exchange:
    """Async Ray actor that dies with the driver. A resumed driver posts the round again that is not committed.

    `max_failures`: how often in a row, without a new step, ranks may be started again.
    """

    def __init__(self, max_failures: int) -> None:
        self._changed = asyncio.Condition()
        self._posted: Posted | None = None
        self._number = 0  # of the last round that was posted
        self._results: dict[int, StepResult] = {}
        self._stored = Stored()  # reported with steps that had been before; it goes with the next new one
        self._max_failures, self._failures = max_failures, 0
        self._cause: RankFailure | None = None  # of the failure that is being dealt with
        self._ended: str | None = None  # why there are no more results
        self._closed = False
        self._there = False  # whether ranks run, as far as is known

    async def post(self, spec: RoundSpec) -> None:
        """Makes a round the current one; the one before must be finished."""
        async with self._changed:
            self._number += 1
            self._posted, self._results, self._stored = Posted(self._number, spec), {}, Stored()
            self._changed.notify_all()

    async def finish(self) -> None:
        """The driver has all results of the round: ranks that are started again now take none until the next."""
        async with self._changed:
            self._posted = None

    async def close(self) -> None:
        """Tells the ranks that no more rounds are posted."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def take(self, after: int, timeout_s: float) -> Posted | Closed | None:
        """The current round once its number is above `after`; None when there is none within `timeout_s`."""
        async with self._changed:
            self._there = True
            if not await self._until(lambda: self._closed or self._is_after(after), timeout_s):
                return None
            return self._posted if self._is_after(after) else Closed()

    async def report(self, number: int, result: StepResult) -> bool:
        """Keeps a step's result of the round of that number. Returns whether the driver waits for more."""
        async with self._changed:
            if number == self._number:
                self._stored += result.stored
                if result.metrics.step not in self._results:
                    self._results[result.metrics.step] = replace(result, stored=self._stored)
                    self._stored, self._failures = Stored(), 0
            self._changed.notify_all()
            return not self._closed and self._ended is None

    async def failed(self, failure: RankFailure) -> None:
        """Takes the error of a rank. Others follow from the first, which ends the training at once if it is lasting."""
        async with self._changed:
            if self._cause is None:
                self._cause = failure
                self._end(failure.reason if failure.lasting else None)

    async def may_restart(self, died: str | None, other: str, counts: bool = True) -> bool:
        """Whether Ray Train may start the ranks again after one has failed: because its process `died`, else of its
        own error, else of `other`. A failure that was planned, as a node that is taken back, does not count."""
        async with self._changed:
            reason = died or (self._cause.reason if self._cause else other)
            self._cause, self._there = None, False
            self._failures += counts
            if self._failures > self._max_failures:
                self._end(
                    f"the training ranks failed {self._failures} times without a new step between "
                    f"(trainer.max_failures={self._max_failures}), the last time of this: {reason}"
                )
            return not self._closed and self._ended is None

    async def has_ranks(self) -> bool:
        """Whether ranks run, or wait for a round; not while they are started, or started again."""
        return self._there

    def _end(self, reason: str | None) -> None:
        self._ended = self._ended or reason
        self._changed.notify_all()

    async def results(self, after_step: int, timeout_s: float) -> list[StepResult]:
        """Results of the current round after `after_step`, in order, once there are any; empty after `timeout_s`.

        Raises TrainingError with the ranks' reason when they gave up and there are no more.
        """
        async with self._changed:
            await self._until(lambda: self._ended is not None or after_step + 1 in self._results, timeout_s)
            if self._ended is not None and after_step + 1 not in self._results:
                raise TrainingError(self._ended)
            steps = itertools.takewhile(lambda step: step in self._results, itertools.count(after_step + 1))
            return [self._results[step] for step in steps]

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether the condition holds within `timeout_s`."""
        try:
            return await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)
        except TimeoutError:
            return False

    def _is_after(self, number: int) -> bool:
        return self._posted is not None and self._posted.number > number
