"""Makes the parts of a stage: each with one remote call, at most a window of them at a time.

A part exists once its file is complete, so a stage that was interrupted makes only the missing ones. Between stages a
part travels as an object reference; its Parquet file is read where that is gone. The driver sees row counts and
references, never the rows.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from sampo_ray.errors import StageError, first_line
from sampo_ray.run.parts import BLOCK_FETCH_S, LOST, Part, logger, part_place
from sampo_ray.run.storage import Place
from sampo_ray.sources.records import batches

STAGE_STALL_S, ATTEMPTS = 1800.0, 4
PAUSE_S, GROWTH = 1.0, 4.0
"""Before a part is made again: 1, 4 and 16 s. An actor that restarts refuses calls meanwhile, also the next at once."""

PARTS_PER_CALL = 32
"""Of calls that only look at parts."""
READS_AT_ONCE = 16

R = TypeVar("R")

Start = Callable[[int, Place, bool], ray.ObjectRef]
"""Begins a call that writes the part of that index there; True: again, as what it was made from may be lost."""


class NotTakenError(Exception):
    """A call that no replica takes just now, since all of them have as many as may wait."""


@ray.remote(num_cpus=0.1)
def collect(out: Place, *tables: pa.Table) -> pa.Table:
    """Writes tables end to end as one part."""
    table = pa.concat_tables(tables)
    out.write_table(table)
    return table


@ray.remote(num_cpus=0, max_retries=3)
def count_rows(table: pa.Table) -> int:
    return table.num_rows


def is_lost(ref: ray.ObjectRef) -> bool:
    """Whether a call has ended without a result because of where it ran; False while it runs."""
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(count_rows.remote(ref), timeout=BLOCK_FETCH_S)
    except RayError as error:
        return isinstance(error, LOST)
    return False


@dataclass(frozen=True)
class StageOutput:
    """Where a stage writes its parts, whom it tells of completed rows, and what makes it stop early.

    Once there is `enough`, the parts in progress are completed and no more are begun.
    """

    folder: Place
    progress: Callable[[int], None] = lambda rows: None
    enough: Callable[[], bool] = lambda: False


def run_stage(out: StageOutput, window: int, count: int, start: Start, keep: bool = True) -> list[Part]:
    """Makes the missing ones of parts 0..count-1, at most `window` at a time; `keep`: and keeps their copies in the
    object store, for a next stage.

    A part whose process died is made again, after a pause, up to ATTEMPTS times. Raises StageError with the reason of a
    call that failed by itself, and when no part is completed within STAGE_STALL_S.
    """
    parts = _present(out.folder, count)
    for part in parts.values():
        out.progress(part.rows)
    work = Work[int](out, window, [index for index in range(count) if index not in parts], start, count_rows.remote)
    for index, ref, rows in work.completed():
        parts[index] = Part(part_place(out.folder, index), rows, ref if keep else None)
        out.progress(rows)
    return [parts[index] for index in sorted(parts)]


def of_each(parts: Sequence[Part], window: int, of: Callable[[pa.Table], R]) -> list[R]:
    """What `of` makes of each part, in their order: PARTS_PER_CALL a call, at most `window` calls at a time."""
    groups = list(batches(parts, PARTS_PER_CALL))
    if not groups:
        return []

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        return _of_each.remote([replace(part, ref=None) if again else part for part in groups[index]], of)

    work = Work[list[R]](StageOutput(parts[0].place), window, range(len(groups)), start, lambda ref: ref)
    made = {index: results for index, _, results in work.completed()}
    return [result for index in sorted(made) for result in made[index]]


@ray.remote(num_cpus=0.1)
def _of_each(parts: Sequence[Part], of: Callable[[pa.Table], Any]) -> list[Any]:
    return [of(part.table()) for part in parts]


@dataclass(frozen=True, order=True)
class _Try:
    """A part that is to be made, not before `due` (time.monotonic)."""

    due: float
    index: int
    attempt: int = 1

    def later(self, pause: float) -> "_Try":
        return replace(self, due=time.monotonic() + pause)

    def again(self) -> "_Try":
        return replace(self.later(PAUSE_S * GROWTH ** (self.attempt - 1)), attempt=self.attempt + 1)


class Work(Generic[R]):
    """Parts that are to be made: those that wait to be made again, the next one first, and those in progress.

    `missing` gives the indices of parts as they become known; it is asked for the next one when a call can begin.
    `result` makes of a call's result what the driver gets to see of it.
    """

    def __init__(
        self,
        out: StageOutput,
        window: int,
        missing: Iterable[int],
        start: Start,
        result: Callable[[ray.ObjectRef], ray.ObjectRef],
    ) -> None:
        self._out, self._window, self._start, self._result = out, window, start, result
        self._missing = iter(missing)
        self._waiting: list[_Try] = []
        self._running: dict[ray.ObjectRef, tuple[_Try, ray.ObjectRef]] = {}
        self._patience = time.monotonic() + STAGE_STALL_S

    def completed(self) -> Iterator[tuple[int, ray.ObjectRef, R]]:
        """The parts, as they are completed: index, the call's result, what the driver sees of it."""
        while True:
            while self._has_next():
                self._begin(heapq.heappop(self._waiting))
            if not self._running and (not self._waiting or self._out.enough()):
                return
            for seen in self._ready():
                this, ref = self._running.pop(seen)
                result = _unless_lost(seen, last=this.attempt == ATTEMPTS)
                if result is None:
                    heapq.heappush(self._waiting, this.again())
                    continue
                self._patience = time.monotonic() + STAGE_STALL_S
                yield this.index, ref, result

    def _has_next(self) -> bool:
        if len(self._running) >= self._window or self._out.enough():
            return False
        if not self._is_due() and (index := next(self._missing, None)) is not None:
            heapq.heappush(self._waiting, _Try(0.0, index))
        return self._is_due()

    def _is_due(self) -> bool:
        return bool(self._waiting) and self._waiting[0].due <= time.monotonic()

    def _begin(self, this: _Try) -> None:
        try:
            ref = self._start(this.index, part_place(self._out.folder, this.index), this.attempt > 1)
        except NotTakenError:
            heapq.heappush(self._waiting, this.later(PAUSE_S))
        else:
            self._running[self._result(ref)] = this, ref

    def _ready(self) -> list[ray.ObjectRef]:
        """Calls that have ended; none when the next part is due."""
        now = time.monotonic()
        if now > self._patience:
            raise StageError(f"nothing was completed in {self._out.folder.url} for {STAGE_STALL_S:.0f} s")
        until = self._patience
        if self._waiting and len(self._running) < self._window:
            until = min(until, max(now, self._waiting[0].due))
        if not self._running:
            time.sleep(until - now)
            return []
        return ray.wait(list(self._running), timeout=until - now)[0]


def _present(folder: Place, count: int) -> dict[int, Part]:
    names, places = set(folder.names()), [part_place(folder, index) for index in range(count)]
    found = {index: place for index, place in enumerate(places) if place.name in names}
    with ThreadPoolExecutor(READS_AT_ONCE) as reads:
        rows = reads.map(Place.table_rows, found.values())
        return {index: Part(place, n) for (index, place), n in zip(found.items(), rows, strict=True)}


def _unless_lost(result: ray.ObjectRef, last: bool) -> Any:
    try:
        return ray.get(result, timeout=BLOCK_FETCH_S)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(error, LOST) and not last:
            logger.warning("a part was lost and is made again: %s", first_line(cause))
            return None
        if isinstance(error, OutOfMemoryError):
            raise StageError(
                f"a process was killed {ATTEMPTS} times because its node was out of memory ({str(cause)[:300]}); lower "
                "fleet.*.max_replicas or trainer.workers, so that fewer share it, or data.max_length"
            ) from None
        raise StageError(f"{type(cause).__name__}: {cause}" if not str(cause) else str(cause)) from None
