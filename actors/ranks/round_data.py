"""The pairs of a round as a rank's steps need them: read from their parts a few steps ahead, and held no longer.

Pairs are numbered in the order in which they are stored, which the first epoch takes. Later epochs of a small round
read the same parts, which are held. Those of others would take the pairs of a step from as many parts; they have parts
of their own in the order of the epoch, which the driver makes while the epoch before trains.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import pyarrow as pa

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.data.preferences import pairs_of
from sampo_ray.training.batching import Pair, Step

T = TypeVar("T")
STEPS_AHEAD = 4
PAIRS_S = 1800.0
"""For the pairs of a step, which are read while steps before it train. Those of a later epoch may still be made."""
LOOK_EVERY_S = 0.5


class StepPairs:
    """Reads the pairs of one rank's rows from a round's parts, which are complete but for those of later epochs."""

    def __init__(self, spec: RoundSpec, rank: int) -> None:
        self._spec, self._stored, self._rank = spec, spec.stored, rank
        self._ends = np.cumsum([part.rows for part in self._stored])
        self._closed = threading.Event()
        held = len(self._stored) if spec.config.rounds.epochs > 1 and not spec.in_order else 2
        self._table = functools.lru_cache(held)(self._read)

    def of(self, step: Step) -> dict[int, Pair]:
        """The pairs of this rank's rows by their numbers."""
        wanted = np.concatenate([step.batch[:0], *step.rows[self._rank]])
        own = step.epoch if self._spec.in_order else 0
        positions = wanted
        if own:
            sorter = np.argsort(step.batch)
            positions = step.first + sorter[np.searchsorted(step.batch, wanted, sorter=sorter)]
        found = dict[int, Pair]()
        part_of = np.searchsorted(self._ends, positions, side="right")
        for index in np.unique(part_of).tolist():
            here, first = part_of == index, self._ends[index] - self._stored[index].rows
            pairs = pairs_of(self._table(own, index).take(pa.array(positions[here] - first)))
            found.update(zip(wanted[here].tolist(), pairs, strict=True))
        return found

    def close(self) -> None:
        """Ends waiting for parts, and holds none any longer."""
        self._closed.set()
        self._table.cache_clear()

    def _read(self, epoch: int, index: int) -> pa.Table:
        """A part in the order of an epoch, once it is there; 0: as it is stored."""
        part = self._stored[index]
        if epoch:
            part = self._spec.epoch_part(epoch, index)
            while not part.place.exists():
                if self._closed.wait(LOOK_EVERY_S):
                    raise TimeoutError(f"{part.place.url} is not there")
        return part.table().combine_chunks()


def read_ahead(
    plan: Iterator[Step], read: Callable[[Step], Mapping[int, Pair]], ahead: int = STEPS_AHEAD
) -> Iterator[tuple[Step, Mapping[int, Pair]]]:
    """Each step of a plan with what `read` finds of it: a thread plans and reads, at most `ahead` steps ahead.

    An error of the thread is raised in place of the step that it belongs to; TimeoutError after PAIRS_S.
    """

    def following() -> tuple[Step, Mapping[int, Pair]] | None:
        step = next(plan, None)
        return None if step is None else (step, read(step))

    thread = ThreadPoolExecutor(1, "pairs")
    try:
        coming = deque(thread.submit(following) for _ in range(ahead))
        while (found := _result(coming.popleft())) is not None:
            coming.append(thread.submit(following))
            yield found
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _result(coming: Future[T]) -> T:
    if not wait([coming], PAIRS_S).done:
        raise TimeoutError(f"the pairs of the next step were not there within {PAIRS_S:.0f} s")
    return coming.result()
