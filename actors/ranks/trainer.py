"""Training under Ray Train, the driver's side: it hands out a round at a time to the ranks (`rank.py`)."""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sampo_ray.actors.nodes import ANYWHERE, Where
from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, Exchange, RoundSpec
from sampo_ray.actors.ranks.failures import StopOrRestart
from sampo_ray.actors.ranks.rank import RankSettings, train_rank
from sampo_ray.actors.waiting import POLL_S, Wait
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import TrainingError, described
from sampo_ray.internals.logical_gpus import logical_gpus
from sampo_ray.run.manifest import StepResult
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)

STOP_S, RESULTS_S = 120.0, 5.0
ELASTIC_S = 30
"""With `min_workers`: how long fewer ranks wait for the others (Ray counts a lost node for a while), and how often Ray
Train looks for room for more."""


class Trainer:
    """Data-parallel ranks under Ray Train, waiting for rounds. Close it to end them.

    With `lifetime: round` they are started for each round, from the checkpoint that ended the last. Ray Train tries for
    ever to start ranks that lack nodes; `wait` says what they lack, and ends it.
    """

    def __init__(self, config: TrainerConfig, store: str, storage: Place, wait: Wait, where: Where = ANYWHERE) -> None:
        self._config, self._store, self._storage = config, store, storage
        self._wait, self._where = wait, where
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
        workers, gpus = config.workers or 1, bool(config.num_gpus)
        on_cpus = not gpus or logical_gpus()
        threads = max(1, torch.get_num_threads() // workers) if on_cpus else None
        fit = TorchTrainer(
            train_rank,
            train_loop_config={"settings": RankSettings(self._exchange, self._store, threads)},
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, workers) if config.min_workers else workers,
                use_gpu=gpus,
                resources_per_worker=resources_of(config, self._where),
                label_selector=dict(self._where.labels) or None,
                # Packed, Ray would fill nodes by the sums of their GPUs: 15 x 0.51 on 8 devices, and wait for ever.
                placement_strategy="SPREAD" if (config.num_gpus or 0) % 1 else "PACK",
                elastic_resize_monitor_interval_s=ELASTIC_S,
            ),
            torch_config=TorchConfig(backend="gloo" if on_cpus else "nccl"),
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

    def await_nodes(self) -> None:
        """Returns once ranks that are being started lack no node. FleetError when one was lacking for too long."""
        while self._thread and not self._ask(self._exchange.has_ranks.remote()) and self._wait.look():
            time.sleep(POLL_S)

    def await_ranks(self) -> None:
        """Returns once the ranks run that are being started. FleetError or TrainingError when they do not start."""
        while self._thread and not self._ask(self._exchange.has_ranks.remote()):
            self._look()
            time.sleep(POLL_S)

    def train(self, spec: RoundSpec, after_step: int, check: Callable[[], None] = lambda: None) -> Iterator[StepResult]:
        """Hands a round to the ranks and yields the results of its steps after `after_step`, as they come.

        `check` is called every few seconds, and raises why the round cannot go on. Raises TrainingError with the first
        cause as soon as a rank has failed for good, or when Ray Train ended before the round did; FleetError when the
        ranks have waited long enough for nodes. The other ranks end meanwhile; `close` waits for them.
        """
        if after_step >= spec.steps:
            return
        if self._thread is None:
            self._start()
        self._ask(self._exchange.post.remote(spec))
        while after_step < spec.steps:
            check()
            results = self._ask(self._exchange.results.remote(after_step, RESULTS_S))
            for result in results:
                after_step = result.metrics.step
                yield result
            if not results:
                self._look()
        self._ask(self._exchange.finish.remote())
        if self._config.lifetime == "round":
            self.close()

    def _look(self) -> None:
        """What may be wrong while no results come: Ray Train has ended, or ranks wait for nodes."""
        if not (self._thread and self._thread.is_alive()):
            raise TrainingError(f"the training ranks ended before the round did: {last_line(self._error)}")
        if not self._ask(self._exchange.has_ranks.remote()):
            self._wait.look()

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
        """Tells the ranks to end, in the midst of a round after its present step, and waits for them. Ranks that wait
        for nodes hold nothing: they end with this process, or once they have started."""
        if self._thread is None:
            return
        running = False
        with contextlib.suppress(TrainingError):  # without their exchange they end by themselves
            running = self._ask(self._exchange.has_ranks.remote())
            self._ask(self._exchange.close.remote())
        self._thread.join(timeout=STOP_S if running else 0)
        if running and self._thread.is_alive():
            logger.warning("the training ranks did not end within %d s", STOP_S)
        self._thread = None


def resources_of(config: TrainerConfig, where: Where = ANYWHERE) -> dict[str, float]:
    """What a rank asks Ray for."""
    asked = {"GPU": config.num_gpus, "memory": where.memory}
    cpus = 1.0 if config.num_cpus is None else config.num_cpus
    return {"CPU": cpus, **{name: float(amount) for name, amount in asked.items() if amount}}


def last_line(error: BaseException | None) -> str:
    """The last line of an error's text: with Ray, the message of the remote process."""
    lines = [line for line in str(error or "they returned early").splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
