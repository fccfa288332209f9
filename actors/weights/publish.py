"""Publishing a version: it is written to the run directory first, then the weight store is told of it."""

from collections.abc import Iterable
from dataclasses import dataclass

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_incrementing

from sampo_ray.actors.transfer.sending import Sender
from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import PublishError, described
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

    @property
    def id(self) -> WeightsId:
        return WeightsId(self.run, self.info.version)

    @property
    def folder(self) -> str:
        return version_folder(self.versions.url, self.info.version)


def publish_version(
    store: ActorHandle,
    new: NewVersion,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    timeout_s: float = 300.0,
) -> WeightsId | None:
    """Writes a version and tells the store; returns what is live afterwards. PublishError: it is on disk alone."""
    write_version(new.folder, tensors, shell_folder, new.info)
    return tell(store, new.id, timeout_s)


def publish_adapters(
    store: ActorHandle,
    new: NewVersion,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: LoraConfig,
    timeout_s: float = 300.0,
) -> WeightsId | None:
    """Publishes adapters alone (`write_adapters`). PublishError: they are on disk alone."""
    write_adapters(new.folder, tensors, config, new.info)
    return tell(store, new.id, timeout_s)


def tell(store: ActorHandle, weights: WeightsId, timeout_s: float) -> WeightsId | None:
    """Tells the store of a complete version, which would find it by itself a little later; returns what is live then.
    Not again after a time-out, as it may still be at work. PublishError, with the reason."""
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, RayError) and not isinstance(error, GetTimeoutError)),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(timeout_s),
        wait=wait_incrementing(PAUSE_S, PAUSE_S),
        reraise=True,
    )
    try:
        return retrying(lambda: ray.get(store.publish.remote(weights.run, weights.version), timeout=timeout_s))
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise PublishError(
            f"version {weights.version} is stored, but the weight store did not take it: {described(cause)}"
        ) from None


def offer(sender: Sender | None, store: ActorHandle, weights: WeightsId, timeout_s: float) -> bool:
    """Tells the store, before a version is complete, that it will be sent; False: replicas fetch it from the store."""
    if sender is None or not sender.free:
        return False
    try:
        ray.get(store.offer_transfer.remote(weights), timeout=timeout_s)
    except RayError:
        return False
    return True
