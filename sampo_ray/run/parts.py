"""Blocks of rows: where they lie, and their object references while those live."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, WorkerCrashedError

from sampo_ray.errors import Elsewhere
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)

FETCH_SECONDS = 120.0
# What a process that died leaves behind, or one that holds other weights by now: the call is made again. Anything else
# is the call's own answer.
LOST = (RayActorError, WorkerCrashedError, ObjectLostError, Elsewhere)


@dataclass(frozen=True)
class Part:
    """One block: `rows` rows at `place` (complete once that exists), and maybe still in the object store."""

    place: Place
    rows: int
    ref: ray.ObjectRef | None = field(default=None, compare=False)

    def table(self) -> pa.Table:
        """The rows: from the object store, or from the Parquet part when the object or its owner is gone."""
        if self.ref is not None:
            try:
                return ray.get(self.ref, timeout=FETCH_SECONDS)
            except (*LOST, GetTimeoutError) as error:
                logger.warning("block %s is read from disk: %s", self.place.url, type(error).__name__)
        return self.place.read_table()

    def argument(self) -> ray.ObjectRef:
        """The block as an argument of a remote call, which arrives there as a table."""
        return self.ref if self.ref is not None else read_part.remote(self)


def part_place(stage: Place, index: int) -> Place:
    return stage.at(f"part-{index:05d}.parquet")


@ray.remote(num_cpus=0.1)
def read_part(part: Part) -> pa.Table:
    return part.table()


def parts_of(stage: Place, rows: Sequence[int]) -> list[Part]:
    return [Part(part_place(stage, index), n) for index, n in enumerate(rows)]
