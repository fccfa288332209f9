"""The driver's side of training: one Ray Train run, to which the loop hands a round at a time."""

import logging
import os
import threading
import uuid
from collections.abc import Iterator

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, Exchange, RoundSpec
from sampo_ray.actors.ranks.rank import RankSettings, train_rank
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import TrainingError
from sampo_ray.run.manifest import StepResult
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)

RESULT_WAIT_S = 5.0
"""Between looks whether Ray Train still runs."""
STOP_S = 120.0
HEALTH_CHECK_EVERY_S = 1
RESOURCES_S = 600
"""How long ranks may wait for their resources."""
ELASTIC_S = 30
"""With `min_workers`: how long fewer ranks wait for the others (Ray counts a lost node for a while), and how often Ray
Train looks for room for more."""


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
        start = ELASTIC_S if config.min_workers else RESOURCES_S
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start))
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(HEALTH_CHECK_EVERY_S))
        self._exchange = ray.remote(Exchange).options(num_cpus=0.1).remote()
        workers = config.workers or 1
        gpus = config.num_gpus or 0
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
            run_config=RunConfig(
                name=f"train-{uuid.uuid4().hex[:8]}",
                storage_path=self._storage.url,
                failure_config=FailureConfig(max_failures=config.max_failures),
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

        Raises TrainingError when the ranks gave up, or when Ray Train ended before the round did.
        """
        if after_step >= spec.steps:
            return
        if self._thread is None:
            self._start()
        ray.get(self._exchange.post.remote(spec), timeout=EXCHANGE_ANSWER_S)
        while after_step < spec.steps:
            waiting = self._exchange.results.remote(after_step, RESULT_WAIT_S)
            try:
                results = ray.get(waiting, timeout=EXCHANGE_ANSWER_S)
            except ray.exceptions.RayTaskError as error:
                raise TrainingError(str(error.cause)) from None
            for result in results:
                after_step = result.metrics.step
                yield result
            if not results and not (self._thread and self._thread.is_alive()):
                raise TrainingError(f"the training ranks ended before the round did: {last_line(self._error)}")
        if self._config.lifetime == "round":
            self.close()

    def close(self) -> None:
        """Tells the ranks to end and waits for them."""
        if self._thread is None:
            return
        ray.get(self._exchange.close.remote(), timeout=EXCHANGE_ANSWER_S)
        self._thread.join(timeout=STOP_S)
        if self._thread.is_alive():
            logger.warning("the training ranks did not end within %d s", STOP_S)
        self._thread = None


def last_line(error: BaseException | None) -> str:
    """The last line of an error's text: with Ray, the message of the remote process."""
    lines = [line for line in str(error or "they returned early").splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
