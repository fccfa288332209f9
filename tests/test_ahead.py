"""How the next round is prepared while one trains, without Ray."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sampo_ray.config.run import load_config
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.errors import StageError
from sampo_ray.loop.ahead import prepare_next_round
from sampo_ray.loop.fleet import Fleet
from sampo_ray.loop.rounds import Round
from sampo_ray.run.directory import create_run
from sampo_ray.run.manifest import StageRecord, StepMetrics, StepResult, Stored
from sampo_ray.run.serving import edit_serving, pin
from sampo_ray.run.versions import VersionInfo, WeightsId, complete_versions
from tests.notes import Notes
from tests.waiting import wait_until


class Handle:
    """A Serve handle that keeps the arguments of its `hold`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.hold = SimpleNamespace(remote=self.calls.append)


def fleet(handle: Handle, start_seconds: float = 60.0) -> Fleet:
    values = dict.fromkeys(field.name for field in dataclasses.fields(Fleet))
    return Fleet(**{**values, "separate_generators": handle, "start_seconds": start_seconds})  # type: ignore[arg-type]


def a_round(index: int = 0, mode: str = "online", generators: GeneratorsConfig | None = None) -> Any:
    config = SimpleNamespace(
        online=mode == "online",
        rounds=SimpleNamespace(count=2),
        rollout=SimpleNamespace(ahead=0),
        fleet=SimpleNamespace(generators=generators or GeneratorsConfig(min_replicas=0, max_replicas=4)),
    )
    return SimpleNamespace(index=index, config=config, seconds_left=None, end=("run", 8))


SCALING = {"max_ongoing_requests": 8, "target_ongoing_requests": 6}


def test_enough_calls_wait_for_generators_that_all_of_them_start() -> None:
    handle = Handle()
    fleet(handle).start_generators(GeneratorsConfig(min_replicas=0, max_replicas=4, **SCALING), ("run", 8))
    assert handle.calls == [WeightsId("run", 8)] * 24


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (GeneratorsConfig(min_replicas=2, max_replicas=2), {}),
        (GeneratorsConfig(min_replicas=0, max_replicas=2), {"shared_policy": "the live policy's, which never sleep"}),
        (GeneratorsConfig(min_replicas=0, max_replicas=2), {"separate_generators": None}),
    ],
)
def test_no_generators_are_called_where_all_of_them_run(settings: GeneratorsConfig, changes: dict[str, Any]) -> None:
    handle = Handle()
    dataclasses.replace(fleet(handle), **changes).start_generators(settings, ("run", 8))
    assert handle.calls == []


def test_generators_are_started_once_the_training_lasts_no_longer_than_their_start_took(monkeypatch) -> None:
    monkeypatch.setattr("sampo_ray.loop.ahead.CHECK_EVERY_S", 0.01)
    handle, training = Handle(), a_round()
    with prepare_next_round(training, fleet(handle), []):
        training.seconds_left = 61.0
        time.sleep(0.1)
        assert handle.calls == []
        training.seconds_left = 59.0
        wait_until(lambda: handle.calls, "call for generators")


@pytest.mark.parametrize("training", [a_round(mode="offline"), a_round(index=1)])
def test_nothing_is_prepared_after_an_offline_or_the_last_round(monkeypatch, training: Any) -> None:
    monkeypatch.setattr("sampo_ray.loop.ahead.CHECK_EVERY_S", 0.01)
    handle, training.seconds_left = Handle(), 1.0
    with prepare_next_round(training, fleet(handle), []):
        time.sleep(0.1)
    assert handle.calls == []


def test_a_failure_of_the_training_is_raised_at_once(monkeypatch) -> None:
    with pytest.raises(ValueError, match="lost"), prepare_next_round(a_round(), fleet(Handle()), []):
        raise ValueError("lost")


def test_no_version_is_removed_while_it_is_not_known_which_are_served(tmp_path) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(tmp_path)}}
    run, notes = create_run(load_config(tree)), Notes()
    for version in range(6):
        info = VersionInfo(version=version, round=0, step=version)
        run.versions.at(f"{version:06d}", "version.json").write(info.model_dump_json().encode())

    def train(step: int) -> None:
        metrics = StepMetrics(0, step, step, {"loss": 1.0})
        Round(run, 0, notes).record(StepResult(metrics, Stored(published=(step,))))

    run.place.at("serving.json").write(b"{")
    train(1)
    assert complete_versions(run.versions.url) == [*range(6)]
    assert "no version is removed" in notes.notes[-1]
    run.place.at("serving.json").remove()
    edit_serving(run.place, lambda state: pin(state, 2).model_copy(update={"checking": 1}))
    train(2)
    assert complete_versions(run.versions.url) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        (
            {"tie": 3, "no finished completion": 29},
            r"\(3 tie, 29 no finished completion\); raise rollout.max_tokens=64",
        ),
        ({"completions without a reward": 128, "tie": 1}, "look at why calls of the reward source fail"),
        ({"tie": 4}, r"\(4 tie\); look at the reward source"),
        ({}, "there are no prompts"),
    ],
)
def test_a_round_without_pairs_says_why_and_what_to_change(tmp_path, dropped, words) -> None:
    tree = {"model": {"path": "m"}, "data": {"prompts": "d"}, "reward": {"function": "a:b"}}
    tree |= {"rounds": {"mode": "online"}, "rollout": {"max_tokens": 64}, "run": {"dir": str(tmp_path)}}
    run = create_run(load_config(tree))
    run.round(0).stages["candidates"] = StageRecord(dropped=dropped)
    with pytest.raises(StageError, match=f"^round 1 has no preference pairs.*{words}"):
        Round(run, 0, Notes()).pairs([])


def test_what_went_wrong_without_hindering_a_step_is_a_note(tmp_path) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(tmp_path)}}
    run, notes = create_run(load_config(tree)), Notes()
    Round(run, 0, notes).record(StepResult(StepMetrics(0, 3, 3, {"loss": 0.5}), Stored(troubles=("no store",))))
    assert notes.notes == ["no store"] and len(run.metrics()) == 1
