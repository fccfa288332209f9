"""Blocks of rows on their way between stages: an object reference for speed, and a durable Parquet part for when it is gone."""

import logging
from dataclasses import dataclass, field

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError

from sampo_ray.runs import Place

logger = logging.getLogger(__name__)

FETCH_SECONDS = 120.0


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
            except (ObjectLostError, GetTimeoutError, RayTaskError) as error:
                logger.warning("block %s is read from disk: %s", self.place.url, type(error).__name__)
        return self.place.read_table()


def part_place(stage: Place, index: int) -> Place:
    return stage.at(f"part-{index:05d}.parquet")
