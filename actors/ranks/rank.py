"""A data-parallel rank under Ray Train: it takes rounds, trains their steps, and has them published and stored."""

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from transformers import AutoConfig

from sampo_ray.actors.ranks.background import Background
from sampo_ray.actors.ranks.checkpoints import Checkpointer, restore
from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, Closed, RoundSpec
from sampo_ray.actors.ranks.failures import RoundAbandoned, failure_of
from sampo_ray.actors.ranks.publishing import Publisher, export
from sampo_ray.actors.ranks.round_data import StepPairs, read_ahead
from sampo_ray.actors.weights.client import find_weight_store
from sampo_ray.config.run import RunConfig
from sampo_ray.data.preferences import pairs_of, with_reference
from sampo_ray.errors import TrainingError
from sampo_ray.run.manifest import StepMetrics, StepResult
from sampo_ray.run.node_copies import version_on_disk
from sampo_ray.run.parts import BLOCK_FETCH_S
from sampo_ray.run.versions import version_folder
from sampo_ray.training.batching import Pair, Step, plan_round
from sampo_ray.training.learner import Learner, load_trained
from sampo_ray.training.memory import check_device
from sampo_ray.training.objective import reference_positions
from sampo_ray.training.off_device import OffDevice
from sampo_ray.training.policy import Policy, load_policy
from sampo_ray.training.streams import adapter_seed

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RankSettings:
    """What a training rank is started with."""

    exchange: ActorHandle
    store: str
    threads: int | None


def train_rank(config: dict[str, RankSettings]) -> None:
    """Ray Train's training function, with its `settings`: takes rounds from the exchange until it is closed.

    An error goes to the exchange first, which knows by that which rank's was the first, and then ends this rank. Ray
    Train starts all ranks again from the last checkpoint that the manifest names, or ends them (`StopOrRestart`).
    """
    import deepspeed  # noqa: F401  # takes seconds; imported while engines start

    settings = config["settings"]
    torch.set_num_threads(settings.threads or threads_of(int(os.environ["LOCAL_WORLD_SIZE"])))
    rounds = Rounds(settings)
    try:
        rounds.train()
    except Exception as error:
        logger.exception("a training rank ends")
        failure = failure_of(error, rounds.config)
        ray.get(settings.exchange.failed.remote(failure), timeout=EXCHANGE_ANSWER_S)
        raise


def threads_of(ranks: int, limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Threads of each of a node's `ranks`, which share its cores: Ray sets one thread for one CPU, and an optimizer
    that is offloaded runs on the CPU. `limit`: where Linux says how many cores a container may use (cgroup 2)."""
    cores = len(os.sched_getaffinity(0))
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    if quota != "max":
        cores = min(cores, int(quota) // int(period))
    return max(1, cores // ranks)


class Rounds:
    """The rounds that a rank trains, and `config` of the last one it took."""

    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        self.config: RunConfig | None = None

    def train(self) -> None:
        """Returns once the exchange is closed between two rounds; in the midst of one it raises RoundAbandoned."""
        exchange, number, rank = self._settings.exchange, 0, None
        while True:
            taken = ray.get(exchange.take.remote(number, 30.0), timeout=EXCHANGE_ANSWER_S)
            if isinstance(taken, Closed):
                if rank is not None:
                    rank.close()
                return
            if taken is None:
                continue
            number, self.config = taken.number, taken.spec.config
            shared, lora = self.config.shares_gpus, self.config.model.lora is not None
            if rank is None or rank.run != taken.spec.run or (shared and lora):
                if rank is not None:
                    rank.close()
                rank = None
                gc.collect()  # DeepSpeed's engine is in reference cycles, and memory may not hold two
                rank = Rank(taken.spec, running_store(self._settings.store))
            elif shared:
                rank.return_to_device()
            for result in rank.train(taken.spec):
                if shared and result.metrics.step == taken.spec.steps:  # before the driver knows
                    rank.leave_device()
                if not rank.first:
                    continue
                if not ray.get(exchange.report.remote(number, result), timeout=EXCHANGE_ANSWER_S):
                    raise RoundAbandoned(f"the driver takes no results after step {result.metrics.step}")


def running_store(name: str) -> ActorHandle:
    try:
        return find_weight_store(name)
    except ValueError as error:  # no fault of the data, for which a ValueError would be taken
        raise RuntimeError(str(error)) from None


class Rank:
    """One data-parallel rank of a run: its learner, and what it reads for it."""

    def __init__(self, spec: RoundSpec, store: ActorHandle) -> None:
        self.run, self.place, self.config = spec.run, spec.place, spec.config
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.first = dist.get_rank() == 0
        self._off_device = OffDevice(self.device)
        self.background = Background()
        self.publisher = Publisher(store, self.config.publish.transport, self.device, self.background)
        self.learner = self._load(spec)
        restore(spec, self.learner)
        self.checkpointer = Checkpointer(self.background, self.learner)
        self.publisher.warm(self.learner)

    def close(self) -> None:
        """Waits for what is done beside the training."""
        self.background.close()
        self.publisher.wait()

    def leave_device(self) -> None:
        """Frees the GPUs of all ranks, for engines. With adapters for good: the next round begins on other weights."""
        self.publisher.wait()
        self.learner.finish_copies()
        if self.device.type == "cuda":
            self._off_device.take(keep=self.config.model.lora is None)
        dist.barrier()

    def return_to_device(self) -> None:
        """Takes the GPU back, as it was."""
        self._off_device.bring_back()

    def _load(self, spec: RoundSpec) -> Learner:
        """A learner on the base or, with adapters, on what the round starts from."""
        lora = self.config.model.lora
        version = spec.start_version if lora else 0
        with version_on_disk(version_folder(self.place.at("versions").url, version)) as base:
            if self.device.type == "cuda":
                check_device(AutoConfig.from_pretrained(base), self.config)
            policy = load_trained(self.config, base, adapter_seed(self.config.run.seed, spec.round), self.device)
            dist.barrier()  # ranks of a node share a copy, which is gone when none of them needs it
        learner = Learner(policy, self.config, self.device)
        learner.begin_round(spec.round, lambda: self._reference(spec))
        return learner

    def _reference(self, spec: RoundSpec) -> Policy:
        """The policy that the round starts from, frozen."""
        with version_on_disk(version_folder(self.place.at("versions").url, spec.start_version)) as folder:
            policy = load_policy(folder, device=str(self.device), attention=self.config.model.computed)
        return policy.in_batches(self.config.batches_answers).requires_grad_(False)

    def train(self, spec: RoundSpec) -> Iterator[StepResult]:
        """Trains the remaining steps of a round and yields their results, published and checkpointed as configured."""
        if spec.round != self.learner.round:
            if self.config.model.lora:
                del self.learner
                gc.collect()
                self.learner = self._load(spec)
            else:
                self.learner.begin_round(spec.round, lambda: self._reference(spec))
        learner, config = self.learner, spec.config
        if learner.step == spec.steps:  # a run goes on whose last export failed
            again = StepMetrics(spec.round, spec.steps, spec.start_version + spec.steps, {})
            yield StepResult(again, unexported=export(spec, self.learner))
            return
        for step, pairs in self._steps(spec):
            started = time.monotonic()
            values = learner.optimize(step, pairs, spec.steps)
            values["pairs_per_s"] = step.pairs / (time.monotonic() - started)
            metrics = StepMetrics(spec.round, step.index, spec.start_version + step.index, values)
            last = step.index == spec.steps
            if last or (step.index % config.publish.every_steps == 0 and not values["skipped"]):
                self.publisher.publish(spec, learner, metrics, last)
            unexported = export(spec, learner) if last else None
            self.checkpointer.after_step(spec, learner, last)
            if last:
                self.background.wait()
                self.checkpointer.check()
                self.publisher.check()
            yield StepResult(metrics, self.background.collect(), unexported)

    def _steps(self, spec: RoundSpec) -> Iterator[tuple[Step, Mapping[int, Pair]]]:
        """The remaining steps of a round with the pairs of this rank's rows."""
        if spec.scored_by_ranks:
            self._score(spec)
        config, learner, pairs = spec.config, self.learner, StepPairs(spec, self.learner.rank)
        lengths = ray.get(spec.lengths, timeout=BLOCK_FETCH_S)
        budget = dataclasses.replace(config.row_budget, world=learner.world)
        seed, epochs = config.run.seed, config.rounds.epochs
        plan = plan_round(lengths, budget, epochs=epochs, seed=seed, round=spec.round, after=learner.step)
        try:
            yield from read_ahead(plan, pairs.of)
        finally:
            pairs.close()

    def _score(self, spec: RoundSpec) -> None:
        """Before its first step, the policy computes and writes reference log-probs that are not there yet."""
        names = [set(spec.references.names() if self.first else ())]
        dist.broadcast_object_list(names)
        missing = [pair for pair in zip(spec.parts, spec.stored, strict=True) if pair[1].place.name not in names[0]]
        if missing and self.learner.step:
            raise TrainingError(
                f"{missing[0][1].place.url} is missing and cannot be computed again, since the policy has been trained "
                "since; restore the file, or begin another run"
            )
        select = reference_positions(self.config, spec.round)
        for part, stored in missing:
            block = part.table()
            scored = with_reference(block, self.learner.score(pairs_of(block), select))
            if self.first:
                stored.place.write_table(scored)
        dist.barrier()  # no rank reads what the first has not written yet
