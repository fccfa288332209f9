"""What a rank publishes of its learner: versions within a round and at its end, and the round's export."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.transfer.sending import start_sender
from sampo_ray.actors.weights.publish import NewVersion, publish_adapters, publish_version
from sampo_ray.errors import OverflowingWeightsError, PublishError
from sampo_ray.run.manifest import StepMetrics, lineage, read_manifest
from sampo_ray.run.version_files import adapters_info, write_version
from sampo_ray.run.versions import VersionInfo, export_folder, labels_of, version_folder
from sampo_ray.training.learner import Learner, drain

logger = logging.getLogger(__name__)

PUBLISH_S = 900.0


class Publisher:
    """Publishes versions of the policy; collective. Rank 0 sends them by `transport` as well."""

    def __init__(self, store: ActorHandle, transport: str, device: torch.device) -> None:
        self._store = store
        self._sender = start_sender(transport, store, device) if dist.get_rank() == 0 else None

    def wait(self) -> None:
        """Returns when nothing is being sent from this process any more."""
        if self._sender is not None:
            self._sender.wait()

    def publish(self, spec: RoundSpec, learner: Learner, metrics: StepMetrics, last: bool) -> str | None:
        """Publishes the weights or, except at the round's end, only the adapters if there are any that can be. Returns
        why they are not served, if so: training goes on."""
        whole = last or learner.adapter_names is None
        lora, versions = None if whole else spec.config.model.lora, spec.place.at("versions")
        weights: Iterator[Any] = learner.adapters() if lora else learner.weights()
        if learner.rank:
            drain(weights)
            return None
        entries = {
            "version": metrics.version,
            "round": spec.round,
            "step": metrics.step,
            "parent": spec.start_version,
            "labels": labels_of(spec.round, metrics.step, last, spec.config.rounds.count),
            **dataclasses.asdict(lineage(spec.config, read_manifest(spec.place).data.fingerprint)),
            "metrics": metrics.numbers,
            "created": int(time.time()),
            **({"adapters": adapters_info(lora, spec.start_version)} if lora else {}),
        }
        new = NewVersion(spec.run, versions, VersionInfo.model_validate(entries), reference=last)
        try:
            if lora:
                publish_adapters(self._store, new, weights, lora, PUBLISH_S)
            else:
                publish_version(self._store, new, weights, version_folder(versions.url, 0), PUBLISH_S, self._sender)
        except PublishError as error:
            logger.warning("training goes on: %s", error)
            return str(error)
        return None


def export(spec: RoundSpec, learner: Learner) -> str | None:
    """Exports the round's model from the fp32 masters. Returns why it cannot be in `run.export_dtype`, if so: the
    step is stored all the same, and the run, resumed with another, exports it."""
    masters = learner.masters(getattr(torch, spec.config.run.export_dtype or "bfloat16"))
    step, folder = learner.step, export_folder(spec.place, spec.round).url
    info = VersionInfo(version=spec.start_version + step, round=spec.round, step=step)
    try:
        if not learner.rank:
            write_version(folder, masters, version_folder(spec.place.at("versions").url, 0), info)
        else:
            drain(masters)
    except OverflowingWeightsError as error:  # on all ranks, once all have been given out
        return str(error)
    return None
