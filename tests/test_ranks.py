"""Training ranks under real Ray Train that fail: what the driver learns, when, and what becomes of the others.

Two gloo ranks do what a script says in place of training: an all-reduce a step, and a failure where it says so.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from sampo_ray.actors.ranks import rank, trainer
from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.ranks.failures import failure_of
from sampo_ray.actors.ranks.trainer import Trainer
from sampo_ray.actors.waiting import Wait
from sampo_ray.actors.weights import publish
from sampo_ray.actors.weights.publish import NewVersion
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import PublishError, TrainingError, VersionError
from sampo_ray.run.manifest import StepMetrics, StepResult
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import VersionInfo, WeightsId, complete_versions
from tests.waiting import scaled

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
STEPS = 6


class Store:
    """A weight store that takes a version once it has refused it so often."""

    def __init__(self, refuses: int) -> None:
        self.asked, self._refuses = 0, refuses

    def publish(self, run: str, version: int, *more: object) -> WeightsId:
        self.asked += 1
        if self.asked <= self._refuses:
            raise VersionError("another process has held serving.lock for 30 s; try again")
        return WeightsId(run, version)

    def calls(self) -> int:
        return self.asked


@pytest.mark.parametrize("refuses", [0, 2, 3])
def test_a_version_that_the_store_does_not_take_is_stored_and_no_reason_to_stop(
    local_ray: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: int
) -> None:
    monkeypatch.setattr(publish, "PAUSE_S", 0.01)
    store = ray.remote(Store).options(num_cpus=0).remote(refuses)
    new = NewVersion("r", Place(str(tmp_path)), VersionInfo(version=4, round=0, step=4))
    weights = [("w", torch.ones(2, 2))]

    def published() -> WeightsId | None:
        return publish.publish_version(store, new, weights, str(tiny_model))

    if refuses < publish.ATTEMPTS:
        assert published() == WeightsId("r", 4)
    else:
        with pytest.raises(
            PublishError, match="version 4 is stored, .*VersionError: another process has held"
        ) as error:
            published()
        assert not failure_of(error.value.__context__, None).lasting
    assert ray.get(store.calls.remote(), timeout=scaled(30)) == min(refuses + 1, publish.ATTEMPTS)
    assert complete_versions(str(tmp_path)) == [4]


class ScriptedRank:
    """Fails on rank 1 before the steps that the run's folder names: `raise-<step>` always, `kill-<step>` once, and
    `kill-always-<step>` always."""

    def __init__(self, spec: RoundSpec, store: object) -> None:
        import torch.distributed as dist

        self.run, self.first = spec.run, dist.get_rank() == 0

    def close(self) -> None:
        pass

    def train(self, spec: RoundSpec) -> Iterator[StepResult]:
        import torch.distributed as dist

        folder = Path(spec.place.path)
        for step in range(1, spec.steps + 1):
            if not self.first:
                fail(folder, step)
            dist.all_reduce(torch.ones(8))
            yield StepResult(StepMetrics(spec.round, step, step, {"loss": 0.5}))


def fail(folder: Path, step: int) -> None:
    if (folder / f"raise-{step}").exists():
        (folder / "raised").touch()
        raise ValueError("the pair makes no sense")
    if (once := folder / f"kill-{step}").exists() or (folder / f"kill-always-{step}").exists():
        once.unlink(missing_ok=True)
        with (folder / "killed").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)


def scripted(config: dict[str, Any]) -> None:
    rank.Rank, rank.running_store = ScriptedRank, lambda name: SimpleNamespace()  # type: ignore[assignment, misc]
    rank.train_rank(config)


@pytest.fixture
def ranks(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """Two ranks that may fail once without a new step."""
    monkeypatch.setattr(trainer, "train_rank", scripted)
    config, wait = TrainerConfig(workers=2, num_cpus=0.5, max_failures=1), Wait([], logger.info, 600)
    running = Trainer(config, "none", Place(str(tmp_path / "ray")), wait)
    yield running
    running.close()


def round_of(folder: Path) -> RoundSpec:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(folder)}}
    return RoundSpec("r", Place(str(folder)), load_config(tree), 0, 0, STEPS, (), np.zeros((0, 3)))


def test_the_error_of_one_rank_ends_all_at_once(ranks: Trainer, tmp_path: Path) -> None:
    """Else the other waits in its collective for half an hour, and the driver for two minutes until it gives it up."""
    (tmp_path / "raise-3").touch()
    steps = []
    with pytest.raises(TrainingError, match="^ValueError: the pair makes no sense$"):
        for result in ranks.train(round_of(tmp_path), after_step=0):
            steps.append(result.metrics.step)
    assert steps == [1, 2][: len(steps)], "the first rank may not have reported the second step before the other fails"
    told = time.time() - (tmp_path / "raised").stat().st_mtime
    ranks.close()
    ended = time.time() - (tmp_path / "raised").stat().st_mtime
    logger.info("the driver knew after %.2f s, all had ended after %.2f s", told, ended)
    assert told < scaled(10) and ended < scaled(60)


def test_failures_count_only_without_a_new_step_between_them(ranks: Trainer, tmp_path: Path) -> None:
    (tmp_path / "kill-2").touch()
    (tmp_path / "kill-always-5").touch()
    with pytest.raises(TrainingError, match="failed 2 times without a new step .*: the process of rank 1 ended"):
        list(ranks.train(round_of(tmp_path), after_step=0))
    assert len((tmp_path / "killed").read_text()) == 3, "once before step 2, and after steps 2 to 4 twice before step 5"
