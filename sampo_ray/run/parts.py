"""Blocks of rows: files of a run directory, and their copies in the object store."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from sampo_ray.errors import WeightsNotLoadedError
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)

BLOCK_FETCH_S = 120.0
LOST = (
    *(RayActorError, WorkerCrashedError, OutOfMemoryError),  # the last: killed by Ray's memory monitor, actors too
    *(NodeDiedError, LocalRayletDiedError, ObjectLostError),
    WeightsNotLoadedError,
)
"""Errors of a call whose process died, or has other weights by now: it is made again. Others are the call's result."""


@dataclass(frozen=True)
class Part:
    """One block: `rows` rows at `place`, complete once that exists; `ref` is its copy in the object store, if any."""

    place: Place
    rows: int
    ref: ray.ObjectRef | None = field(default=None, compare=False)

    def table(self) -> pa.Table:
        """The rows, from the object store or, where the object or its owner is gone, from the file."""
        if self.ref is not None:
            try:
                return ray.get(self.ref, timeout=BLOCK_FETCH_S)
            except (*LOST, GetTimeoutError) as error:
                logger.warning("block %s is read from its file (%s)", self.place.url, type(error).__name__)
        return self.place.read_table()

    def argument(self, again: bool = False) -> ray.ObjectRef:
        """The block as an argument of a remote call, where it arrives as a table; `again`: from the file, as its copy
        in the object store may be lost."""
        return self.ref if self.ref is not None and not again else _read.remote(replace(self, ref=None))


def part_place(stage: Place, index: int) -> Place:
    return stage.at(f"part-{index:05d}.parquet")


_read = ray.remote(num_cpus=0.1)(Part.table)


def parts_of(stage: Place, rows: Sequence[int]) -> list[Part]:
    return [Part(part_place(stage, index), n) for index, n in enumerate(rows)]
