"""Publishing a version: it is written to the run directory first, then handed to the weight store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ray
import torch
from ray.actor import ActorHandle

from sampo_ray.actors.transfer.sending import Sender
from sampo_ray.actors.weights.client import put
from sampo_ray.config.sections import LoraConfig
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_adapters, write_version
from sampo_ray.run.versions import VersionInfo, WeightsId, version_folder


@dataclass(frozen=True)
class NewVersion:
    """A version to publish: its run, the run's folder of versions, and its version.json."""

    run: str
    versions: Place
    info: VersionInfo
    reference: bool = False
    """A round begins with it."""

    @property
    def folder(self) -> str:
        return version_folder(self.versions.url, self.info.version)


def publish_version(
    store: ActorHandle,
    new: NewVersion,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    timeout_s: float = 300.0,
    sender: Sender | None = None,
) -> WeightsId | None:
    """Streams `tensors` to disk and object store, then tells the store; returns the id that is live afterwards. A
    `sender` then sends the version by a transport while this process goes on."""
    buckets = write_version(new.folder, tensors, shell_folder, new.info, keep=put)
    offered = sender is not None and sender.free
    call = store.publish.remote(new.run, new.info.version, new.reference, buckets, offered)
    live = ray.get(call, timeout=timeout_s)
    if sender is not None and offered:
        sender.send(WeightsId(new.run, new.info.version), buckets)
    return live


def publish_adapters(
    store: ActorHandle,
    new: NewVersion,
    weights: Iterable[tuple[str, Sequence[torch.Tensor]]],
    config: LoraConfig,
    timeout_s: float = 300.0,
) -> WeightsId | None:
    """Publishes adapters alone (`write_adapters`); they are small, and replicas fetch them from the object store."""
    bucket = write_adapters(new.folder, weights, config, new.info, put)
    call = store.publish.remote(new.run, new.info.version, new.reference, [bucket])
    return ray.get(call, timeout=timeout_s)
