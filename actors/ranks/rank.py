"""A training rank: takes rounds from the exchange, has its learner train on them, publishes weights and checkpoints."""

import dataclasses
import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from transformers import AutoConfig

from sampo_ray.actors.ranks.exchange import Work
from sampo_ray.actors.transfer.sending import start_sender
from sampo_ray.actors.weights.store import find_weight_store, publish_adapters, publish_version
from sampo_ray.data.preferences import pairs_of, with_reference
from sampo_ray.errors import TrainingError, WeightsError
from sampo_ray.run.adapter_files import about_adapters
from sampo_ray.run.buckets import checksum_of_file, checksums
from sampo_ray.run.manifest import Checkpoint, lineage, read_manifest
from sampo_ray.run.parts import part_place
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.version_folders import version_folder
from sampo_ray.run.versions import labels_of
from sampo_ray.training.batching import plan_round
from sampo_ray.training.learner import Learner, drain, of_all_ranks, write_universal
from sampo_ray.training.memory import check_device
from sampo_ray.training.objective import asked_of_reference
from sampo_ray.training.policy import Policy, load_policy
from sampo_ray.training.streams import adapter_seed

logger = logging.getLogger(__name__)

CALL_SECONDS = 60.0
PUBLISH_SECONDS = 900.0
# Trying these again gives the same: the driver is told, and nothing is retried.
DETERMINISTIC = (TrainingError, WeightsError, ValueError, TypeError, LookupError, AttributeError, ImportError)


@dataclasses.dataclass(frozen=True)
class RankSettings:
    """What a training rank is started with."""

    exchange: ActorHandle
    store: str
    threads: int | None


def train_rank(settings: dict[str, Any]) -> None:
    """Ray Train's training function: takes rounds from the exchange until it is closed.

    What would fail again is reported to the driver and ends the run cleanly; anything else ends this process, and Ray
    Train starts all ranks again from the last checkpoint that the manifest names.
    """
    import deepspeed  # noqa: F401  # for seconds, while engines start; the learner needs it

    mine = RankSettings(**settings)
    if mine.threads:
        torch.set_num_threads(mine.threads)
    number, rank = 0, None
    try:
        while True:
            taken = ray.get(mine.exchange.take.remote(number, CALL_SECONDS / 2), timeout=CALL_SECONDS)
            if taken == "closed":
                if rank is not None and rank.sender is not None:
                    rank.sender.wait()  # it sends from this process
                return
            if taken == "wait":
                continue
            number, work = taken
            if rank is None or rank.run != work.run:
                rank = None
                gc.collect()  # DeepSpeed's engine is in cycles, and two may be too much
                rank = Rank(work, find_weight_store(mine.store))
            for step, result in rank.train(work):
                if dist.get_rank() == 0:
                    ray.get(mine.exchange.report.remote(number, step, result), timeout=CALL_SECONDS)
    except DETERMINISTIC as error:
        logger.exception("training stops")
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, TrainingError) else str(error)
        ray.get(mine.exchange.fail.remote(reason), timeout=CALL_SECONDS)


class Rank:
    """One data-parallel rank of a run: its learner, and what it publishes and stores."""

    def __init__(self, work: Work, store: ActorHandle) -> None:
        self.run, self.store, self.place, self.config = work.run, store, work.place, work.config
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.first = dist.get_rank() == 0
        self.sender = start_sender(self.config.publish.transport, store, self.device) if self.first else None
        self.learner = self._load(work)
        self._restore(work)

    def _load(self, work: Work) -> Learner:
        """A learner on what the run began with or, where each round has adapters of its own, the round."""
        lora = self.config.model.lora
        version = work.start_version if lora else 0
        with Place(version_folder(self.place.at("versions").url, version)).on_disk() as base:
            if self.device.type == "cuda":
                check_device(AutoConfig.from_pretrained(base), self.config)
            seed, flex = adapter_seed(self.config.run.seed, work.round), self.config.model.flex
            policy = load_policy(base, self.config.trainer.gradient_checkpointing, lora=lora, seed=seed, flex=flex)
        learner = Learner(policy, self.config, self.device)
        learner.begin_round(work.round, lambda: self._reference(work))
        return learner

    def _reference(self, work: Work) -> Policy:
        """What the round starts from, frozen."""
        with Place(version_folder(self.place.at("versions").url, work.start_version)).on_disk() as folder:
            return load_policy(folder, device=str(self.device), flex=self.config.model.flex).requires_grad_(False)

    def _begin(self, work: Work) -> None:
        """The next round: with the same learner or, where it has adapters of its own, with another."""
        if self.config.model.lora:
            del self.learner
            gc.collect()
            self.learner = self._load(work)
        else:
            self.learner.begin_round(work.round, lambda: self._reference(work))

    def train(self, work: Work) -> Iterator[tuple[int, dict[str, Any]]]:
        """Trains what is left of a round and yields (step, result), published and checkpointed as configured."""
        if work.round != self.learner.round:
            self._begin(work)
        learner, config = self.learner, work.config
        with_log_probs = config.method.needs_reference and not config.reference_workers
        tables = self._scored(work) if with_log_probs else (part.table() for part in work.parts)
        pairs = [pair for table in tables for pair in pairs_of(table)]
        budget = dataclasses.replace(config.row_budget, world=learner.world)
        seed, epochs = config.run.seed, config.rounds.epochs
        plan = plan_round(work.lengths, budget, epochs=epochs, seed=seed, round=work.round)
        for step in plan:
            if step.index <= learner.step:
                continue
            started = time.monotonic()
            result: dict[str, Any] = learner.optimize(step, pairs, work.steps)
            result["pairs_per_s"] = step.pairs / (time.monotonic() - started)
            last = step.index == work.steps
            version = work.start_version + step.index
            if last or (step.index % config.publish.every_steps == 0 and not result["skipped"]):
                result["published"] = self._publish(work, version, last, result)
            if last:
                self._export(work)
            if last or step.index % config.trainer.checkpoint_every == 0:
                result["checkpoint"] = self._checkpoint(work)
            yield step.index, result | {"round": work.round, "step": step.index, "version": version}

    def _scored(self, work: Work) -> Iterator[pa.Table]:
        """The round's parts of pairs with reference log-probs: the policy's own, written before its first step."""
        out = work.place.at("rounds", str(work.round), "reference")
        for index, part in enumerate(work.parts):
            place = part_place(out, index)
            found = [self.first and place.exists()]
            dist.broadcast_object_list(found)
            if found[0]:
                yield place.read_table()
                continue
            if self.learner.step:
                raise TrainingError(f"{place.url} is gone, and the policy no longer is the reference that it came from")
            block, ask = part.table(), asked_of_reference(self.config, work.round)
            scored = with_reference(block, self.learner.score(pairs_of(block), ask))
            if self.first:
                place.write_table(scored)
            yield scored

    def _publish(self, work: Work, version: int, last: bool, metrics: dict[str, Any]) -> bool:
        """Publishes the weights or, where there are adapters and the round goes on, these."""
        lora, versions = None if last else work.config.model.lora, work.place.at("versions").url
        weights: Iterator[Any] = self.learner.adapters() if lora else self.learner.weights()
        if not self.first:
            drain(weights)
            return True
        about: dict[str, Any] = {
            "round": work.round,
            "step": self.learner.step,
            "parent": work.start_version,
            "labels": labels_of(work.round, self.learner.step, last, work.config.rounds.count),
            **lineage(work.config, read_manifest(self.place)),
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
            "created": int(time.time()),
        }
        where = self.store, work.run, versions, version
        if lora:
            about["adapters"] = about_adapters(lora, work.start_version)
            publish_adapters(*where, weights, lora, about, timeout_s=PUBLISH_SECONDS)
        else:
            shell = version_folder(versions, 0)
            publish_version(*where, weights, shell, last, about, timeout_s=PUBLISH_SECONDS, sender=self.sender)
        return True

    def _export(self, work: Work) -> None:
        """The round's Hugging Face folder, from the fp32 masters."""
        dtype = getattr(torch, work.config.run.export_dtype)
        masters = ((name, weight.to(dtype)) for name, weight in self.learner.masters())
        if self.first:
            step = self.learner.step
            about = {"version": work.start_version + step, "round": work.round, "step": step}
            folder = work.place.at("exports", f"round-{work.round + 1}").url
            write_version(folder, masters, version_folder(work.place.at("versions").url, 0), about)
        else:
            drain(masters)

    def _checkpoint(self, work: Work) -> dict[str, Any]:
        """Writes the learner's state; complete once the driver has named it, with its checksums, in the manifest."""
        learner = self.learner
        target = work.place.at("checkpoints", f"{work.round}-{learner.step:06d}")
        if self.first:
            target.remove()
        dist.barrier()
        with target.draft() as scratch:
            learner.save(scratch, "state")
            mine = checksums(scratch / "state")
            target.take(scratch / "state")
        files = {name: sum for files in of_all_ranks(mine) for name, sum in files.items()}
        return Checkpoint(
            path=f"checkpoints/{work.round}-{learner.step:06d}",
            round=work.round,
            step=learner.step,
            world=learner.world,
            files=files,
            statistics=learner.statistics,
        ).model_dump()

    def _restore(self, work: Work) -> None:
        """Goes to where the newest checkpoint stands or, if that is damaged, the one before."""
        if self.first:
            self.place.at("checkpoints").clear_drafts()  # of ranks that died over them
        found = [self._checkpoints(work) if self.first else []]
        dist.broadcast_object_list(found)
        damaged = list[str]()
        for checkpoint in found[0]:
            if self.config.model.lora and checkpoint.round != work.round:
                return
            with self.place.at(checkpoint.path).on_disk() as folder:
                if files := self._damaged(folder, checkpoint):
                    damaged += files
                    continue
                if damaged and self.first:
                    logger.warning("%s is damaged; training goes on from %s", damaged[0], checkpoint.path)
                self._go_to(checkpoint, folder)
                return
        if damaged:
            raise TrainingError(
                f"{damaged[0]} is damaged (its checksum does not match), and there is no other checkpoint to go on from"
            )

    def _checkpoints(self, work: Work) -> list[Checkpoint]:
        """Those from which a round can go on or begin, the newest first."""
        manifest = read_manifest(self.place)

        def fits(checkpoint: Checkpoint) -> bool:
            ends = checkpoint.step == manifest.rounds[checkpoint.round].steps
            return checkpoint.round == work.round or (ends and checkpoint.round == work.round - 1)

        return [each for each in (manifest.checkpoint, manifest.earlier) if each and fits(each)]

    def _damaged(self, folder: Path, checkpoint: Checkpoint) -> list[str]:
        """Files that are not what was written; each rank looks at some, and knows of all."""
        mine = [
            f"{checkpoint.path}/{name}"
            for name in sorted(checkpoint.files)[self.learner.rank :: self.learner.world]
            if not (folder / name).is_file() or checksum_of_file(folder / name) != checkpoint.files[name]
        ]
        return [name for some in of_all_ranks(mine) for name in some]

    def _go_to(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Loads what is in a checkpoint's folder, whatever number of ranks wrote it."""
        standing = checkpoint.round, checkpoint.step, checkpoint.statistics
        universal = self.place.at(f"{checkpoint.path}-universal")
        if self.first:
            universal.remove()  # of ranks that died over it
        if checkpoint.world == self.learner.world:
            self.learner.load(folder.parent, folder.name, *standing)
            return
        if self.first:
            logger.info("%s is of %d ranks, not %d", checkpoint.path, checkpoint.world, self.learner.world)
            with universal.draft() as scratch:
                write_universal(folder, scratch / "state")
                universal.take(scratch / "state")
        dist.barrier()
        with universal.on_disk() as merged:
            self.learner.load(merged.parent, merged.name, *standing, universal=True)
        dist.barrier()
        if self.first:
            universal.remove()
