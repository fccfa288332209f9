"""Weights as the store hands them out: buckets in the object store."""

import time
from dataclasses import dataclass, replace

import ray

from sampo_ray.run.buckets import Bucket, verify
from sampo_ray.run.version_folders import VersionInfo, WeightsId


@dataclass(frozen=True)
class Weights:
    """A version as the store hands it out: `info` is its version.json, the buckets' data are object references."""

    id: WeightsId
    info: VersionInfo
    buckets: tuple[Bucket, ...]
    sequence: int = 0
    """How many times what its channel hands out had changed before; orders answers even across a rollback."""
    adapters: Bucket | None = None
    """LoRA adapters that are yet to be merged into the buckets (`adapters.py`), which are those of another version."""


def put(bucket: Bucket) -> Bucket:
    return replace(bucket, data=ray.put(bucket.data))


def rest(since: float, share: float) -> None:
    """Sleeps for as long as makes the work done since then (time.perf_counter) `share` of the time.

    An engine that computes on the same cores waits in each step for the slowest of its threads.
    """
    time.sleep((1 / share - 1) * (time.perf_counter() - since))


def fetch(bucket: Bucket, timeout_s: float) -> Bucket:
    """The bucket with its bytes in this process (a read-only view of the object store), verified."""
    here = replace(bucket, data=ray.get(bucket.data, timeout=timeout_s))
    verify(here)
    return here
