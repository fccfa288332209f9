"""Makes the parts of a stage: each with one remote call, at most a window of them at a time.

A part exists once its file is complete, so a stage that was interrupted makes only the missing ones. Between stages a
part travels as an object reference; its Parquet file is read where that is gone. The driver sees row counts and
references, never the rows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from sampo_ray.errors import StageError
from sampo_ray.run.parts import BLOCK_FETCH_S, LOST, Part, logger, part_place
from sampo_ray.run.storage import Place

STAGE_STALL_S, ATTEMPTS = 1800.0, 4


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


def run_stage(out: StageOutput, window: int, count: int, start: Callable[[int, Place], ray.ObjectRef]) -> list[Part]:
    """Makes the missing ones of parts 0..count-1, at most `window` at a time; `start` begins a call that writes one.

    A part whose process died is made again. Raises StageError with the reason of a call that failed by itself, and when
    no part is completed within STAGE_STALL_S.
    """
    parts = _present(out.folder, count)
    for part in parts.values():
        out.progress(part.rows)
    waiting = deque((index, 1) for index in range(count) if index not in parts)
    running: dict[ray.ObjectRef, tuple[int, int, ray.ObjectRef]] = {}
    while running or (waiting and not out.enough()):
        while waiting and len(running) < window and not out.enough():
            index, attempt = waiting.popleft()
            ref = start(index, part_place(out.folder, index))
            running[count_rows.remote(ref)] = index, attempt, ref
        ready, _ = ray.wait(list(running), timeout=STAGE_STALL_S)
        if not ready:
            raise StageError(f"nothing was completed in {out.folder.url} for {STAGE_STALL_S:.0f} s")
        for counted in ready:
            index, attempt, ref = running.pop(counted)
            rows = _rows_unless_lost(counted, last=attempt == ATTEMPTS)
            if rows is None:
                waiting.appendleft((index, attempt + 1))
            else:
                parts[index] = Part(part_place(out.folder, index), rows, ref)
                out.progress(rows)
    return [parts[index] for index in sorted(parts)]


def _present(folder: Place, count: int) -> dict[int, Part]:
    names, places = set(folder.names()), [part_place(folder, index) for index in range(count)]
    return {i: Part(place, place.table_rows()) for i, place in enumerate(places) if place.url.split("/")[-1] in names}


def _rows_unless_lost(counted: ray.ObjectRef, last: bool) -> int | None:
    try:
        return ray.get(counted, timeout=BLOCK_FETCH_S)
    except RayError as error:
        if isinstance(error, LOST) and not last:
            logger.warning("a part was lost and is made again: %s", str(error).splitlines()[0])
            return None
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise StageError(f"{type(cause).__name__}: {cause}" if not str(cause) else str(cause)) from None
