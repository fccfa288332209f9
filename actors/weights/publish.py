"""Publishing a version: it is written to the run directory first, then handed to the weight store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_incrementing

from sampo_ray.actors.transfer.sending import Sender
from sampo_ray.actors.weights.client import put
from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import PublishError, described
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_adapters, write_version
from sampo_ray.run.versions import VersionInfo, WeightsId, version_folder

ATTEMPTS, PAUSE_S = 3, 1.0


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
    `sender` then sends the version by a transport while this process goes on. PublishError: it is on disk alone."""
    buckets = write_version(new.folder, tensors, shell_folder, new.info, keep=put)
    offered = sender is not None and sender.free
    live = _tell(store, new, buckets, offered, timeout_s)
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
    """Publishes adapters alone (`write_adapters`); they are small, and replicas fetch them from the object store.
    PublishError: they are on disk alone."""
    bucket = write_adapters(new.folder, weights, config, new.info, put)
    return _tell(store, new, [bucket], False, timeout_s)


def _tell(
    store: ActorHandle, new: NewVersion, buckets: Sequence[Bucket], offered: bool, timeout_s: float
) -> WeightsId | None:
    """Tells the store of a version, which it may be told again. Not after a time-out, as it may still be at work."""
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, RayError) and not isinstance(error, GetTimeoutError)),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(timeout_s),
        wait=wait_incrementing(PAUSE_S, PAUSE_S),
        reraise=True,
    )
    try:
        return retrying(lambda: ray.get(_publish(store, new, buckets, offered), timeout=timeout_s))
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise PublishError(
            f"version {new.info.version} is stored, but the weight store did not take it: {described(cause)}"
        ) from None


def _publish(store: ActorHandle, new: NewVersion, buckets: Sequence[Bucket], offered: bool) -> ray.ObjectRef:
    return store.publish.remote(new.run, new.info.version, new.reference, buckets, offered)
