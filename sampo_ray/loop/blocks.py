"""Blocks of rows on their way between stages: an object reference for speed, and a durable Parquet part for when it is
gone.

A stage is a list of parts, each made by one call. A part exists once it is complete, so a stage that was cut off makes
only what is missing. The driver sees row counts and references, never the rows.
"""

from collections import deque
from collections.abc import Callable

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from sampo_ray.errors import StageError
from sampo_ray.run.parts import FETCH_SECONDS, LOST, Part, logger, part_place
from sampo_ray.run.storage import Place

STALL_SECONDS = 1800.0
ATTEMPTS = 4


@ray.remote(num_cpus=0.1)
def collect(out: Place, *tables: pa.Table) -> pa.Table:
    """Tables end to end as one part."""
    table = pa.concat_tables(tables)
    out.write_table(table)
    return table


@ray.remote(num_cpus=0, max_retries=3)
def count_rows(table: pa.Table) -> int:
    return table.num_rows


def is_lost(ref: ray.ObjectRef) -> bool:
    """Whether a call is over and has left nothing because of where it ran; one that still runs is not lost."""
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(count_rows.remote(ref), timeout=FETCH_SECONDS)
    except RayError as error:
        return isinstance(error, LOST)
    return False


def run_stage(
    out: Place,
    count: int,
    start: Callable[[int, Place], ray.ObjectRef],
    window: int,
    progress: Callable[[int], None] = lambda rows: None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Part]:
    """Makes the parts 0..count-1 of a stage that are missing, at most `window` at a time; `start` makes one, and
    writes it. Once there is `enough`, those that are begun are completed, and these are all.

    A part whose process died is begun again. Raises StageError with the reason of a call that failed by itself, and
    when nothing is completed for STALL_SECONDS.
    """
    parts: dict[int, Part] = {}
    present = set(out.names())
    todo: deque[tuple[int, int]] = deque()
    for index in range(count):
        place = part_place(out, index)
        if place.url.rsplit("/", 1)[-1] in present:
            parts[index] = Part(place, place.table_rows())
            progress(parts[index].rows)
        else:
            todo.append((index, 1))
    flying: dict[ray.ObjectRef, tuple[int, int, ray.ObjectRef]] = {}
    while flying or (todo and not enough()):
        while todo and len(flying) < window and not enough():
            index, attempt = todo.popleft()
            ref = start(index, part_place(out, index))
            flying[count_rows.remote(ref)] = index, attempt, ref
        ready, _ = ray.wait(list(flying), timeout=STALL_SECONDS)
        if not ready:
            raise StageError(f"nothing was completed in {out.url} for {STALL_SECONDS:.0f} s")
        for counted in ready:
            index, attempt, ref = flying.pop(counted)
            rows = _rows_unless_lost(counted, last=attempt == ATTEMPTS)
            if rows is None:
                todo.appendleft((index, attempt + 1))
            else:
                parts[index] = Part(part_place(out, index), rows, ref)
                progress(rows)
    return [parts[index] for index in sorted(parts)]


def _rows_unless_lost(counted: ray.ObjectRef, last: bool) -> int | None:
    try:
        return ray.get(counted, timeout=FETCH_SECONDS)
    except RayError as error:
        if isinstance(error, LOST) and not last:
            logger.warning("a part is made again: %s", str(error).splitlines()[0])
            return None
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise StageError(f"{type(cause).__name__}: {cause}" if not str(cause) else str(cause)) from None
