"""The weight store as other actors see it: how to find it, what it answers, and how to read its buckets."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import ray
from ray.actor import ActorHandle

from sampo_ray.actors.weights.turns import Turn
from sampo_ray.run.buckets import Bucket, verify
from sampo_ray.run.report import PinName, PinState, Trouble
from sampo_ray.run.serving import Done, Serving, VersionEntry
from sampo_ray.run.versions import VersionInfo, WeightsId

NAMESPACE = "sampo"
Channel = Literal["live", "training"]
"""`training`: the newest published version, for rollouts. `live`: the version in serving.json, for the endpoint."""


@dataclass(frozen=True)
class Weights:
    """A version's weights; the buckets' data are object references."""

    id: WeightsId
    info: VersionInfo
    buckets: tuple[Bucket, ...]
    sequence: int = 0
    """How often the channel's version had changed before; it orders answers even across a rollback."""
    adapters: Bucket | None = None
    """LoRA adapters that the reader merges into the buckets, which are then those of the adapters' base version."""


@dataclass(frozen=True)
class StoreState:
    """What is served and what is on disk; `apps` is the prefix of the fleet's Serve applications."""

    run: str
    apps: str
    serving: Serving
    versions: list[VersionEntry]
    pins: Mapping[PinName, PinState] = field(default_factory=dict)
    """Empty without a fleet."""
    troubles: tuple[Trouble, ...] = ()
    handed_out: int | None = None
    """The sequence of the live version that readers get; behind `serving` while another one is being loaded."""
    gpus: Turn = "engines"
    """Whose turn it is on GPUs that engines and training ranks share by time."""

    @property
    def labels(self) -> dict[int, tuple[str, ...]]:
        return {entry.version: entry.labels for entry in self.versions}

    def pin(self, name: PinName) -> PinState:
        """The application that answers for a pinned version, by its number, or an adapter, by its name."""
        return self.pins.get(name, PinState(state="pinned"))


@dataclass(frozen=True)
class CommandAnswer:
    """What a command did, and the state now; `repeated`: it had been carried out before, and only then."""

    done: Done
    repeated: bool
    state: StoreState


def find_weight_store(name: str) -> ActorHandle:
    """The running store of that name; ValueError (Ray's) when there is none."""
    return ray.get_actor(name, namespace=NAMESPACE)


def put(bucket: Bucket) -> Bucket:
    """The bucket with its bytes in the object store."""
    return replace(bucket, data=ray.put(bucket.data))


def fetch(bucket: Bucket, timeout_s: float) -> Bucket:
    """The bucket with its bytes in this process (a read-only view of the object store), verified."""
    here = replace(bucket, data=ray.get(bucket.data, timeout=timeout_s))
    verify(here)
    return here


def throttle(begun: float, share: float) -> None:
    """Sleeps until the work since `begun` (time.perf_counter) has taken only `share` of the time: an engine that
    computes on the same cores waits in each step for the slowest of its threads."""
    time.sleep((1 / share - 1) * (time.perf_counter() - begun))
