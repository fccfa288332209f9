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

from sampo_ray.actors.ranks import trainer
from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.ranks.trainer import Trainer
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import TrainingError
from sampo_ray.run.manifest import StepMetrics, StepResult
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
STEPS = 6


class ScriptedRank:
    """Fails on rank 1 before the steps that the run's folder names: `raise-<step>` always, `kill-<step>` once, and
    `kill-always-<step>` always."""

    def __init__(self, spec: RoundSpec, store: object) -> None:
        import torch.distributed as dist

        self.run, self.first, self.sender = spec.run, dist.get_rank() == 0, None

    def train(self, spec: RoundSpec) -> Iterator[StepResult]:
        import torch
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
    trainer.Rank, trainer.running_store = ScriptedRank, lambda name: SimpleNamespace()  # type: ignore[assignment, misc]
    trainer.train_rank(config)


@pytest.fixture
def ranks(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """Two ranks that may fail once without a new step."""
    monkeypatch.setattr(trainer, "train_rank", scripted)
    running = Trainer(TrainerConfig(workers=2, num_cpus=0.5, max_failures=1), "none", Place(str(tmp_path / "ray")))
    yield running
    running.close()


def round_of(folder: Path) -> RoundSpec:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(folder)}}
    return RoundSpec("r", Place(str(folder)), load_config(tree), 0, 0, STEPS, (), np.zeros((0, 3)))


def test_the_error_of_one_rank_ends_all_at_once(ranks: Trainer, tmp_path: Path) -> None:
    """Else the other waits in its collective for half an hour, and the driver for two minutes until it gives it up."""
    (tmp_path / "raise-3").touch()
    results = ranks.train(round_of(tmp_path), after_step=0)
    assert [next(results).metrics.step for _ in range(2)] == [1, 2]
    with pytest.raises(TrainingError, match="^ValueError: the pair makes no sense$"):
        next(results)
    told = time.time() - (tmp_path / "raised").stat().st_mtime
    ranks.close()
    ended = time.time() - (tmp_path / "raised").stat().st_mtime
    logger.info("the driver knew after %.2f s, all had ended after %.2f s", told, ended)
    assert told < 10 and ended < 60


def test_failures_count_only_without_a_new_step_between_them(ranks: Trainer, tmp_path: Path) -> None:
    (tmp_path / "kill-2").touch()
    (tmp_path / "kill-always-5").touch()
    with pytest.raises(TrainingError, match="failed 2 times without a new step .*: the process of rank 1 ended"):
        list(ranks.train(round_of(tmp_path), after_step=0))
    assert len((tmp_path / "killed").read_text()) == 3, "once before step 2, and after steps 2 to 4 twice before step 5"
