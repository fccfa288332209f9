"""A training rank: a DeepSpeed engine that takes rounds from the exchange, publishes weights and writes checkpoints."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from sampo_ray.actors.exchange import TrainingError, Work
from sampo_ray.actors.sending import start_sender
from sampo_ray.actors.weight_store import find_weight_store, publish_version
from sampo_ray.actors.weights import (
    WeightsError,
    checksum,
    version_folder,
    write_version,
)
from sampo_ray.batching import Step, assemble, plan_round
from sampo_ray.config import OptimConfig, RunConfig
from sampo_ray.losses import Statistics
from sampo_ray.objective import METRICS, Draw, idle_loss, row_losses
from sampo_ray.policy import Policy, load_policy
from sampo_ray.runs import Checkpoint, Place, lineage, read_manifest
from sampo_ray.versions import labels_of

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


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step 1..steps of a round: linear warm-up to the peak, then linear decay towards zero."""
    warmup = math.ceil(optim.warmup_ratio * steps)
    if step <= warmup:
        return optim.learning_rate * step / warmup
    return optim.learning_rate * (steps - step + 1) / (steps - warmup)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings: bf16 compute; fp32 masters, accumulation and reduction; we say when a step ends."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.trainer.zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "steps_per_print": 10**9,
    }


def train_rank(settings: dict[str, Any]) -> None:
    """Ray Train's training function: takes rounds from the exchange until it is closed.

    What would fail again is reported to the driver and ends the run cleanly; anything else ends this process, and Ray
    Train starts all ranks again from the last checkpoint that the manifest names.
    """
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
                rank = Rank(work, find_weight_store(mine.store))
            for step, result in rank.train(work):
                if dist.get_rank() == 0:
                    ray.get(mine.exchange.report.remote(number, step, result), timeout=CALL_SECONDS)
    except DETERMINISTIC as error:
        logger.exception("training stops")
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, TrainingError) else str(error)
        ray.get(mine.exchange.fail.remote(reason), timeout=CALL_SECONDS)


class Rank:
    """One data-parallel rank: a DeepSpeed engine and where it stands, `step` optimizer steps into `round`."""

    def __init__(self, work: Work, store: ActorHandle) -> None:
        import deepspeed

        # Without this DeepSpeed compiles a shared-memory extension, for minutes, that gloo runs do not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.run, self.store, self.place, self.config = work.run, store, work.place, work.config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.sender = start_sender(self.config.publish.transport, store, self.device) if self.rank == 0 else None
        with Place(version_folder(self.place.at("versions").url, 0)).on_disk() as base:
            policy = load_policy(base, self.config.trainer.gradient_checkpointing)
        optim = self.config.optim
        adamw = torch.optim.AdamW(
            policy.parameters(),
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=adamw, config=deepspeed_config(self.config), dist_init_required=False
        )
        self.engine.train()
        self.round, self.step, self.statistics = 0, 0, Statistics()
        self._restore()

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def train(self, work: Work) -> Iterator[tuple[int, dict[str, Any]]]:
        """Trains what is left of a round and yields (step, result), published and checkpointed as configured."""
        if work.round != self.round or not self.step:
            self._begin_round(work.round)
        pairs = pa.concat_tables([part.table() for part in work.parts])
        config = work.config
        plan = plan_round(
            work.lengths,
            batch_size=config.optim.batch_size,
            tokens_per_row=config.tokens_per_row,
            world=self.world,
            epochs=config.rounds.epochs,
            seed=config.run.seed,
            round=work.round,
        )
        for step in plan:
            if step.index <= self.step:
                continue
            started = time.monotonic()
            result = self._optimize(step, pairs, work)
            result["pairs_per_s"] = step.pairs / (time.monotonic() - started)
            self.step, last = step.index, step.index == work.steps
            version = work.start_version + step.index
            if last or step.index % config.publish.every_steps == 0:
                result["published"] = self._publish(work, version, last, result)
            if last:
                self._export(work)
            if last or step.index % config.trainer.checkpoint_every == 0:
                result["checkpoint"] = self._checkpoint(work)
            yield step.index, result | {"round": work.round, "step": step.index, "version": version}

    def _begin_round(self, round: int) -> None:
        """The optimizer starts afresh, in place: ZeRO keeps views of these tensors. The fp32 masters stay."""
        for state in self.engine.optimizer.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "step"):
                if name in state:
                    state[name].zero_()
        self.round, self.step, self.statistics = round, 0, Statistics()

    def _optimize(self, step: Step, pairs: pa.Table, work: Work) -> dict[str, Any]:
        """One optimizer step: mean loss over the pairs of the global batch, gradients summed over rows and ranks."""
        config, sums = work.config, torch.zeros(len(METRICS))
        draw = Draw(config.run.seed, work.round, step.epoch)
        for indices in step.rows[self.rank]:
            if len(indices):
                mine = pairs.take(pa.array(indices))
                row = assemble(mine).to(self.device)
                losses, row_sums = row_losses(self.engine, row, mine, config.method, draw, self.statistics)
                sums += row_sums.cpu()
                loss = losses.sum() * (self.world / step.pairs)
            else:
                loss = idle_loss(self.engine, self.device)
            self.engine.backward(loss)
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        metrics = dict(zip(METRICS, (sums / step.pairs).tolist(), strict=True))
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"the loss of round {work.round}, step {step.index} is {metrics['loss']}; "
                "lower optim.learning_rate, or look at the pairs of that step; nothing was published from it"
            )
        self.statistics = self.statistics.after(metrics, step.pairs)
        lr = learning_rate(config.optim, step.index, work.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return metrics | {"learning_rate": lr, "grad_norm": float(norm) if norm is not None else None}

    def _publish(self, work: Work, version: int, last: bool, metrics: dict[str, Any]) -> bool:
        versions, shell = work.place.at("versions").url, version_folder(work.place.at("versions").url, 0)
        if self.rank == 0:
            about = {
                "round": work.round,
                "step": self.step,
                "parent": work.start_version,
                "labels": labels_of(work.round, self.step, last, work.config.rounds.count),
                **lineage(work.config, read_manifest(self.place)),
                "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
                "created": int(time.time()),
            }
            publish_version(
                self.store,
                work.run,
                versions,
                version,
                self._weights(),
                shell,
                last,
                about,
                timeout_s=PUBLISH_SECONDS,
                sender=self.sender,
            )
        else:
            drain(self._weights())
        return True

    def _export(self, work: Work) -> None:
        """The round's Hugging Face folder, from the fp32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        dtype = getattr(torch, work.config.run.export_dtype)

        def masters() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in self.policy.model.named_parameters():
                yield name, safe_get_full_fp32_param(parameter).to(dtype)

        if self.rank == 0:
            about = {"version": work.start_version + self.step, "round": work.round, "step": self.step}
            folder = work.place.at("exports", f"round-{work.round + 1}").url
            write_version(folder, masters(), version_folder(work.place.at("versions").url, 0), about)
        else:
            drain(masters())

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The bf16 weights, parameter by parameter; under ZeRO-3 each is gathered for as long as it is looked at."""
        from deepspeed import zero

        for name, parameter in self.policy.model.named_parameters():
            if self.config.trainer.zero_stage == 3:
                with zero.GatheredParameters([parameter]):
                    yield name, parameter.data
            else:
                yield name, parameter.data

    def _checkpoint(self, work: Work) -> dict[str, Any]:
        """Writes the engine's state; complete once the driver has named it, with its checksums, in the manifest."""
        target = work.place.at("checkpoints", f"{work.round}-{self.step:06d}")
        if self.rank == 0:
            target.remove()
        dist.barrier()
        with target.draft() as scratch:
            self.engine.save_checkpoint(str(scratch), tag="state", save_latest=False)
            mine = {path.name: checksum(path.read_bytes()) for path in (scratch / "state").iterdir()}
            target.take(scratch / "state")
        everyone: list[dict[str, str]] = [{} for _ in range(self.world)]
        dist.all_gather_object(everyone, mine)
        files = {name: sum for files in everyone for name, sum in files.items()}
        return Checkpoint(
            path=f"checkpoints/{work.round}-{self.step:06d}",
            round=work.round,
            step=self.step,
            world=self.world,
            files=files,
            statistics=self.statistics,
        ).model_dump()

    def _restore(self) -> None:
        """Goes to where the manifest's checkpoint stands; rank 0 reads it for all, so that all agree."""
        found = [read_manifest(self.place).checkpoint if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        checkpoint = found[0]
        if checkpoint is None:
            return
        if checkpoint.world != self.world:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} was written by {checkpoint.world} ranks, this run has {self.world}; "
                f"resume with trainer.workers={checkpoint.world}"
            )
        with self.place.at(checkpoint.path).on_disk() as folder:
            for name, expected in checkpoint.files.items():
                if checksum((folder / name).read_bytes()) != expected:
                    raise TrainingError(f"checkpoint {checkpoint.path}/{name} is damaged (its checksum does not match)")
            self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        self.round, self.step, self.statistics = checkpoint.round, checkpoint.step, checkpoint.statistics


def drain(tensors: Iterator[Any]) -> None:
    """Takes part in the collectives of an iteration whose values another rank uses."""
    for _ in tensors:
        pass
