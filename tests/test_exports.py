"""Exports: their data type, and what happens where weights do not fit into it."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.ranks.rank import Rank
from sampo_ray.actors.weights.publish import NewVersion
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import OverflowingWeightsError, TrainingError
from sampo_ray.loop import stages
from sampo_ray.loop.fleet import _publish_base
from sampo_ray.loop.rounds import Round
from sampo_ray.loop.validate import decided
from sampo_ray.run.directory import Run, create_run, open_run
from sampo_ray.run.manifest import Checkpoint, Stored
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo, export_folder, is_complete, version_folder
from sampo_ray.training.saving import Cast

from .test_saved import small_files, small_model

STEPS = 4


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a version 0, whose first round has steps."""
    run = create_run(
        load_config({"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}})
    )
    base, shell = VersionInfo(version=0, round=0, step=0), str(small_files("llama", tmp_path / "model"))
    write_version(version_folder(run.versions.url, 0), [("w", torch.ones(2))], shell, base)
    run.round(0).steps = STEPS
    return run


def in_dtype(config: RunConfig, dtype: str | None) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"export_dtype": dtype})})


def exported_by_a_rank(run: Run, dtype: str) -> Any:
    """What a rank reports that has trained all steps of the round, whose weights hold one of 70,000."""

    def masters(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        cast = Cast(dtype)
        yield "w", cast("w", torch.tensor([7e4, 1.0]))
        cast.check()

    rank: Any = object.__new__(Rank)
    rank.background = MagicMock(collect=Stored)
    rank.learner = SimpleNamespace(step=STEPS, round=0, rank=0, masters=masters)
    parts, lengths = (), np.zeros((0, 3))
    (result,) = rank.train(RoundSpec(run.id, run.place, in_dtype(run.config, dtype), 0, 0, STEPS, parts, lengths))
    return result


def first_step_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """The step after which the driver wants the results of the round's ranks."""
    asked = []
    trainer: Any = SimpleNamespace(train=lambda spec, after_step, check: iter(asked.append(after_step) or ()))
    monkeypatch.setattr(stages, "lengths", lambda pairs: np.ones((STEPS * run.config.optim.batch_size, 3)))
    monkeypatch.setattr("ray.put", lambda lengths: lengths)
    reporter = MagicMock(stage=lambda *_: nullcontext(MagicMock()))
    list(Round(run, 0, reporter).train([], trainer))
    return asked[0] + 1


def test_weights_that_float16_cannot_hold_stop_a_run_that_has_stored_them_and_goes_on_in_bfloat16(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Checkpoint(path="checkpoints/0-000004", round=0, step=STEPS, world=1, files={})
    failed = dataclasses.replace(exported_by_a_rank(run, "float16"), stored=Stored(checkpoints=(stored,)))
    with pytest.raises(TrainingError, match=r"float16 cannot hold 1 of the weights.*set run\.export_dtype=bfloat16"):
        Round(run, 0, MagicMock()).record(failed)
    run = open_run(run.place.url)
    assert run.manifest.checkpoint == stored and not is_complete(export_folder(run.place, 0).url)
    assert first_step_asked_for(run, monkeypatch) == STEPS
    assert exported_by_a_rank(run, "bfloat16").unexported is None
    folder = Path(export_folder(run.place, 0).path)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert first_step_asked_for(run, monkeypatch) == STEPS + 1


@pytest.mark.parametrize(("files", "meant"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float16")])
def test_exports_are_in_bfloat16_where_the_models_files_are_and_nothing_else_is_asked_for(
    tmp_path: Path, files: torch.dtype, meant: str
) -> None:
    small_model("llama", tmp_path).to(files).save_pretrained(tmp_path)
    tree = {"model": {"path": str(tmp_path)}, "data": {"train": "d"}, "run": {"dir": "run"}}
    config = load_config(tree)
    assert decided(config).run.export_dtype == meant
    for dtype in ("float16", "bfloat16"):
        assert decided(in_dtype(config, dtype)).run.export_dtype == dtype


def test_a_run_whose_model_does_not_fit_into_float16_ends_at_its_start(run: Run, tmp_path: Path) -> None:
    model = small_model("llama", tmp_path / "large")
    model.lm_head.weight.data[1, 2] = 7e4
    model.save_pretrained(tmp_path / "large")
    publish = _publish_base._function  # without Ray
    new = NewVersion(run.id, run.versions, VersionInfo(version=0, round=0, step=0))
    with pytest.raises(OverflowingWeightsError, match=r"float16 cannot hold 1 of .* in model\.embed_tokens\.weight\)"):
        publish(str(tmp_path / "large"), run.place.at("tokenizer"), None, new, "float16")
