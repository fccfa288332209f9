"""Training under Ray Train: the driver's side, which hands out a round at a time, and what each rank does with it."""

import contextlib
import dataclasses
import gc
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoConfig

from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, Closed, Exchange, RoundSpec
from sampo_ray.actors.ranks.failures import RoundAbandoned, StopOrRestart, failure_of
from sampo_ray.actors.transfer.sending import start_sender
from sampo_ray.actors.weights.client import find_weight_store
from sampo_ray.actors.weights.publish import NewVersion, publish_adapters, publish_version
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.data.preferences import pairs_of, with_reference
from sampo_ray.errors import OverflowingWeightsError, PublishError, TrainingError, described
from sampo_ray.run.buckets import checksum_of_file, checksums
from sampo_ray.run.manifest import Checkpoint, StepMetrics, StepResult, lineage, read_manifest
from sampo_ray.run.parts import part_place
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import adapters_info, write_version
from sampo_ray.run.versions import VersionInfo, export_folder, labels_of, version_folder
from sampo_ray.training.batching import plan_round
from sampo_ray.training.learner import Learner, drain, from_all_ranks
from sampo_ray.training.memory import check_device
from sampo_ray.training.objective import reference_positions
from sampo_ray.training.policy import Policy, load_policy
from sampo_ray.training.streams import adapter_seed

logger = logging.getLogger(__name__)

STOP_S = 120.0
ELASTIC_S = 30
"""With `min_workers`: how long fewer ranks wait for the others (Ray counts a lost node for a while), and how often Ray
Train looks for room for more."""
PUBLISH_S = 900.0


class Trainer:
    """Data-parallel ranks under Ray Train, waiting for rounds. Close it to end them.

    With `lifetime: round` they are started for each round, from the checkpoint that ended the last.
    """

    def __init__(self, config: TrainerConfig, store: str, storage: Place) -> None:
        self._config, self._store, self._storage = config, store, storage
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if config.lifetime == "run":
            self._start()

    def _start(self) -> None:
        config = self._config
        start = ELASTIC_S if config.min_workers else 600  # seconds that ranks may wait for their resources
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start))
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "10")  # a rank may wait in a collective
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        start_exchange = ray.remote(Exchange).options(num_cpus=0.1, scheduling_strategy=here)
        self._exchange = start_exchange.remote(config.max_failures)
        workers, gpus = config.workers or 1, config.num_gpus or 0
        threads = None if gpus else max(1, torch.get_num_threads() // workers)
        cpus = 1.0 if config.num_cpus is None else config.num_cpus
        fit = TorchTrainer(
            train_rank,
            train_loop_config={"settings": RankSettings(self._exchange, self._store, threads)},
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, workers) if config.min_workers else workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
                elastic_resize_monitor_interval_s=ELASTIC_S,
            ),
            # A new name each time: the manifest decides where to continue, not Ray's state of an earlier driver.
            run_config=TrainRunConfig(
                name=f"train-{uuid.uuid4().hex[:8]}",
                storage_path=self._storage.url,
                failure_config=FailureConfig(max_failures=-1),  # the callback counts them
                callbacks=[StopOrRestart(self._exchange)],
            ),
        )
        self._thread = threading.Thread(target=self._run, args=(fit,), name="ray-train", daemon=True)
        self._thread.start()

    def _run(self, fit: TorchTrainer) -> None:
        try:
            fit.fit()
        except BaseException as error:  # raised in the loop, which waits for results
            self._error = error

    def train(self, spec: RoundSpec, after_step: int) -> Iterator[StepResult]:
        """Hands a round to the ranks and yields the results of its steps after `after_step`, as they come.

        Raises TrainingError with the first cause as soon as a rank has failed for good, or when Ray Train ended before
        the round did. The other ranks end meanwhile; `close` waits for them.
        """
        if after_step >= spec.steps:
            return
        if self._thread is None:
            self._start()
        self._ask(self._exchange.post.remote(spec))
        while after_step < spec.steps:
            # After 5 s without results it looks whether Ray Train still runs.
            results = self._ask(self._exchange.results.remote(after_step, 5.0))
            for result in results:
                after_step = result.metrics.step
                yield result
            if not results and not (self._thread and self._thread.is_alive()):
                raise TrainingError(f"the training ranks ended before the round did: {last_line(self._error)}")
        if self._config.lifetime == "round":
            self.close()

    def _ask(self, call: ray.ObjectRef) -> Any:
        """The exchange's answer. TrainingError, also where the exchange is gone."""
        try:
            return ray.get(call, timeout=EXCHANGE_ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise TrainingError(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            reason = f"the actor between driver and training ranks does not answer ({described(error)})"
            raise TrainingError(reason) from None

    def close(self) -> None:
        """Tells the ranks to end, in the midst of a round after its present step, and waits for them."""
        if self._thread is None:
            return
        with contextlib.suppress(TrainingError):  # without their exchange they end by themselves
            self._ask(self._exchange.close.remote())
        self._thread.join(timeout=STOP_S)
        if self._thread.is_alive():
            logger.warning("the training ranks did not end within %d s", STOP_S)
        self._thread = None


def last_line(error: BaseException | None) -> str:
    """The last line of an error's text: with Ray, the message of the remote process."""
    lines = [line for line in str(error or "they returned early").splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


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
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rounds = Rounds(settings)
    try:
        rounds.train()
    except Exception as error:
        logger.exception("a training rank ends")
        failure = failure_of(error, rounds.config)
        ray.get(settings.exchange.failed.remote(failure), timeout=EXCHANGE_ANSWER_S)
        raise


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
                if rank is not None and rank.sender is not None:
                    rank.sender.wait()  # it sends from this process
                return
            if taken is None:
                continue
            number, self.config = taken.number, taken.spec.config
            if rank is None or rank.run != taken.spec.run:
                rank = None
                gc.collect()  # DeepSpeed's engine is in reference cycles, and memory may not hold two
                rank = Rank(taken.spec, running_store(self._settings.store))
            for result in rank.train(taken.spec):
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
    """One data-parallel rank of a run: its learner, and what it publishes and stores."""

    def __init__(self, spec: RoundSpec, store: ActorHandle) -> None:
        self.run, self.store, self.place, self.config = spec.run, store, spec.place, spec.config
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.first = dist.get_rank() == 0
        self.sender = start_sender(self.config.publish.transport, store, self.device) if self.first else None
        self.learner = self._load(spec)
        self._restore(spec)

    def _load(self, spec: RoundSpec) -> Learner:
        """A learner on the base or, with adapters, on what the round starts from."""
        lora = self.config.model.lora
        version = spec.start_version if lora else 0
        with Place(version_folder(self.place.at("versions").url, version)).on_disk() as base:
            if self.device.type == "cuda":
                check_device(AutoConfig.from_pretrained(base), self.config)
            seed, kind = adapter_seed(self.config.run.seed, spec.round), self.config.model.computed
            checkpointing = self.config.trainer.gradient_checkpointing
            policy = load_policy(base, checkpointing, lora=lora, seed=seed, attention=kind)
        learner = Learner(policy.in_batches(self.config.batches_answers), self.config, self.device)
        learner.begin_round(spec.round, lambda: self._reference(spec))
        return learner

    def _reference(self, spec: RoundSpec) -> Policy:
        """The policy that the round starts from, frozen."""
        with Place(version_folder(self.place.at("versions").url, spec.start_version)).on_disk() as folder:
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
            yield StepResult(again, unexported=self._export(spec))
            return
        with_log_probs = config.method.needs_reference and not config.reference_workers
        tables = self._scored(spec) if with_log_probs else (part.table() for part in spec.parts)
        pairs = [pair for table in tables for pair in pairs_of(table)]
        budget = dataclasses.replace(config.row_budget, world=learner.world)
        seed, epochs = config.run.seed, config.rounds.epochs
        for step in plan_round(spec.lengths, budget, epochs=epochs, seed=seed, round=spec.round):
            if step.index <= learner.step:
                continue
            started = time.monotonic()
            values = learner.optimize(step, pairs, spec.steps)
            values["pairs_per_s"] = step.pairs / (time.monotonic() - started)
            metrics = StepMetrics(spec.round, step.index, spec.start_version + step.index, values)
            last = step.index == spec.steps
            trouble = unexported = None
            if publish := last or (step.index % config.publish.every_steps == 0 and not values["skipped"]):
                trouble = self._publish(spec, metrics, last)
            if last:
                unexported = self._export(spec)
            store = last or step.index % config.trainer.checkpoint_every == 0
            checkpoint = self._checkpoint(spec) if store else None
            yield StepResult(metrics, publish, checkpoint, trouble, unexported)

    def _scored(self, spec: RoundSpec) -> Iterator[pa.Table]:
        """The round's parts with reference log-probs: the policy computes and writes them before its first step."""
        out = spec.place.at("rounds", str(spec.round), "reference")
        for index, part in enumerate(spec.parts):
            place = part_place(out, index)
            found = [self.first and place.exists()]
            dist.broadcast_object_list(found)
            if found[0]:
                yield place.read_table()
                continue
            if self.learner.step:
                raise TrainingError(
                    f"{place.url} is missing and cannot be computed again, since the policy has been trained since; "
                    "restore the file, or begin another run"
                )
            block, select = part.table(), reference_positions(self.config, spec.round)
            scored = with_reference(block, self.learner.score(pairs_of(block), select))
            if self.first:
                place.write_table(scored)
            yield scored

    def _publish(self, spec: RoundSpec, metrics: StepMetrics, last: bool) -> str | None:
        """Publishes the weights or, except at the round's end, only the adapters if there are any that can be. Returns
        why they are not served, if so: training goes on."""
        whole = last or self.learner.adapter_names is None
        lora, versions = None if whole else spec.config.model.lora, spec.place.at("versions")
        weights: Iterator[Any] = self.learner.adapters() if lora else self.learner.weights()
        if not self.first:
            drain(weights)
            return None
        entries = {
            "version": metrics.version,
            "round": spec.round,
            "step": metrics.step,
            "parent": spec.start_version,
            "labels": labels_of(spec.round, metrics.step, last, spec.config.rounds.count),
            **dataclasses.asdict(lineage(spec.config, read_manifest(self.place).data.fingerprint)),
            "metrics": metrics.numbers,
            "created": int(time.time()),
            **({"adapters": adapters_info(lora, spec.start_version)} if lora else {}),
        }
        new = NewVersion(spec.run, versions, VersionInfo.model_validate(entries), reference=last)
        try:
            if lora:
                publish_adapters(self.store, new, weights, lora, PUBLISH_S)
            else:
                publish_version(self.store, new, weights, version_folder(versions.url, 0), PUBLISH_S, self.sender)
        except PublishError as error:
            logger.warning("training goes on: %s", error)
            return str(error)
        return None

    def _export(self, spec: RoundSpec) -> str | None:
        """Exports the round's model from the fp32 masters. Returns why it cannot be in `run.export_dtype`, if so: the
        step is stored all the same, and the run, resumed with another, exports it."""
        masters = self.learner.masters(getattr(torch, spec.config.run.export_dtype or "bfloat16"))
        step, folder = self.learner.step, export_folder(spec.place, spec.round).url
        info = VersionInfo(version=spec.start_version + step, round=spec.round, step=step)
        try:
            if self.first:
                write_version(folder, masters, version_folder(spec.place.at("versions").url, 0), info)
            else:
                drain(masters)
        except OverflowingWeightsError as error:  # on all ranks, once all have been given out
            return str(error)
        return None

    def _checkpoint(self, spec: RoundSpec) -> Checkpoint:
        """Writes the learner's state; complete once the manifest names it with its checksums."""
        learner, path = self.learner, f"checkpoints/{spec.round}-{self.learner.step:06d}"
        target = spec.place.at(path)
        if self.first:
            target.remove()
        dist.barrier()
        with target.draft() as scratch:
            learner.save(scratch, "state")
            sums = checksums(scratch / "state")
            target.take(scratch / "state")
        files = {name: sum for files in from_all_ranks(sums) for name, sum in files.items()}
        step, world, statistics = learner.step, learner.world, learner.statistics
        return Checkpoint(path=path, round=spec.round, step=step, world=world, files=files, statistics=statistics)

    def _restore(self, spec: RoundSpec) -> None:
        """Loads the newest checkpoint or, if that is damaged, the one before."""
        if self.first:
            self.place.at("checkpoints").clear_drafts()  # of ranks that died while writing
        found = [self._checkpoints(spec) if self.first else []]
        dist.broadcast_object_list(found)
        damaged = list[str]()
        for checkpoint in found[0]:
            if self.config.model.lora and checkpoint.round != spec.round:
                return
            with self.place.at(checkpoint.path).on_disk() as folder:
                if not (files := self._damaged(folder, checkpoint)):
                    if damaged and self.first:
                        logger.warning("%s is damaged; training continues from %s", damaged[0], checkpoint.path)
                    self._load_checkpoint(checkpoint, folder)
                    return
                damaged += files
        if damaged:
            raise TrainingError(
                f"{damaged[0]} is damaged (its checksum does not match), and there is no other checkpoint to go on from"
            )

    def _checkpoints(self, spec: RoundSpec) -> list[Checkpoint]:
        """Checkpoints from which the round can continue or begin, the newest first."""
        manifest = read_manifest(self.place)

        def fits(checkpoint: Checkpoint) -> bool:
            ends = checkpoint.step == manifest.rounds[checkpoint.round].steps
            return checkpoint.round == spec.round or (ends and checkpoint.round == spec.round - 1)

        return [each for each in (manifest.checkpoint, manifest.earlier) if each and fits(each)]

    def _damaged(self, folder: Path, checkpoint: Checkpoint) -> list[str]:
        """Files that differ from what was written; each rank checks some, and returns those of all."""
        mine = [
            f"{checkpoint.path}/{name}"
            for name in sorted(checkpoint.files)[self.learner.rank :: self.learner.world]
            if not (folder / name).is_file() or checksum_of_file(folder / name) != checkpoint.files[name]
        ]
        return [name for some in from_all_ranks(mine) for name in some]

    def _load_checkpoint(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Loads a checkpoint from its folder; one of another number of ranks is converted first."""
        position = checkpoint.round, checkpoint.step, checkpoint.statistics
        universal = self.place.at(f"{checkpoint.path}-universal")
        if self.first:
            universal.remove()  # of ranks that died while writing
        if checkpoint.world == self.learner.world:
            self.learner.load(folder.parent, folder.name, *position)
            return
        if self.first:
            logger.info("converting %s from %d to %d ranks", checkpoint.path, checkpoint.world, self.learner.world)
            with universal.draft() as scratch:
                from sampo_ray.internals.deepspeed import write_universal

                write_universal(folder, scratch / "state")
                universal.take(scratch / "state")
        dist.barrier()
        with universal.on_disk() as merged:
            self.learner.load(merged.parent, merged.name, *position, universal=True)
        dist.barrier()
        if self.first:
            universal.remove()
