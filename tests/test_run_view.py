"""The live view of a run: its status file, and the answer of `GET /run`."""

import asyncio
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.evaluation import probe
from sampo_ray.evaluation.probe import Answer
from sampo_ray.evaluation.records import Conditions, TaskResult, write_result
from sampo_ray.run.directory import Activity, Status, StatusFile, read_status
from sampo_ray.run.manifest import DataRecord, Manifest, RoundRecord, StageRecord, StepMetrics
from sampo_ray.run.storage import Place
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.routes import page as run_view
from sampo_ray.serve.routes.page import POINTS, STEPS, PageRoutes, columns, view
from tests.waiting import wait_until

TRAINING = Activity(name="train", done=3, total=16, unit="steps", seconds=2.0, rate=1.5)


def step(version: int, **changed: Any) -> StepMetrics:
    return StepMetrics(0, version, version, {"loss": 0.5, "margin": 0.1, "accuracy": 1.0, **changed})


def write_run(folder: Path, steps: int, **manifest: Any) -> Place:
    folder.mkdir(exist_ok=True)
    lines = "".join(step(version).line() + "\n" for version in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text(lines)
    record = RoundRecord(index=0, start_version=0, steps=16, stages={"pairs": StageRecord(rows=[255], seconds=0.5)})
    data = DataRecord(source=f"{folder}/prompts.jsonl", fingerprint="f", rows=[255])
    manifest_json = Manifest(id="run-a", rounds=[record], data=data, **manifest).model_dump_json()
    (folder / "manifest.json").write_text(manifest_json)
    return Place(str(folder))


@pytest.fixture(params=["disk", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(str(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}")


def test_the_status_file_has_the_running_stage_and_that_the_run_has_ended(place: Place) -> None:
    file = StatusFile(place)
    file.update(Status(round=1, rounds=3, stage=TRAINING))
    wait_until(lambda: read_status(place), "status file")
    status = read_status(place)
    assert status is not None and status.alive()
    assert (status.round, status.rounds, status.stage) == (1, 3, TRAINING)
    file.close()
    ended = read_status(place)
    assert ended is not None and not ended.alive() and ended.stage is None and ended.round == 1


def test_changes_are_written_at_most_once_a_second_and_the_last_always(tmp_path: Path, monkeypatch: Any) -> None:
    writes: list[bytes] = []
    monkeypatch.setattr(Place, "write", lambda self, content: writes.append(content))
    file, began = StatusFile(Place(str(tmp_path))), time.monotonic()
    for done in range(200):
        file.update(Status(round=done))
        time.sleep(0.005)
    file.close()
    assert len(writes) <= 3 + (time.monotonic() - began)
    assert json.loads(writes[-1])["round"] == 199


def test_a_store_that_hangs_or_fails_does_not_hold_up_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    release, written = threading.Event(), threading.Event()

    def write(self: Place, content: bytes) -> None:
        release.wait(60)
        written.set()
        raise OSError("no space")

    monkeypatch.setattr(Place, "write", write)
    file = StatusFile(Place(str(tmp_path)))
    for _ in range(1000):
        file.update(Status(stage=TRAINING))
    assert not written.is_set()
    release.set()
    file.close()
    assert written.is_set()


def test_a_run_whose_process_was_killed_is_not_taken_for_alive(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    run.at("status.json").write(Status(round=1, stage=TRAINING, time=time.time() - 60).model_dump_json().encode())
    seen = view(run)
    assert (seen["alive"], seen["stage"], seen["finished"], seen["round"]) == (False, None, False, 1)


def test_the_view_has_the_stage_the_rounds_and_the_curves_and_no_paths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    (tmp_path / "run" / "config.yaml").write_text(
        f"model: {{path: {tmp_path}/models/tiny}}\ndata: {{train: pairs}}\nrounds: {{count: 2}}\nrun: {{dir: r}}\n"
    )
    run.at("status.json").write(Status(round=1, stage=TRAINING, time=time.time()).model_dump_json().encode())
    seen = view(run)
    assert seen["alive"] and seen["stage"]["done"] == 3
    assert (seen["run"], seen["base"], seen["method"], seen["rounds"]) == (
        "run-a",
        "tiny",
        "sigmoid/sample, beta 0.1",
        2,
    )
    assert seen["history"][0]["stages"] == [{"name": "pairs", "seconds": 0.5}]
    assert seen["steps"]["version"] == [1, 2, 3] and seen["steps"]["loss"] == [0.5] * 3
    assert str(tmp_path) not in json.dumps(seen)


def test_a_long_run_is_read_from_its_end_and_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 8000)
    with open(run.at("metrics.jsonl").path, "a") as file:
        file.write('{"loss": 0.1, "ver')
    seen = view(run)["steps"]
    assert seen["version"][-1] == 8000
    assert seen["version"][0] > 8000 - STEPS
    assert len(seen["version"]) <= POINTS + 1


@given(st.integers(0, 2 * STEPS))
def test_thinning_keeps_the_last_step_and_does_not_jump_as_steps_come(count: int) -> None:
    steps = [step(version) for version in range(1, count + 1)]
    kept = columns(steps)["version"]
    assert len(kept) <= POINTS + 1
    assert kept[-1:] == ([count] if count else [])
    if count > 1 and -(-count // POINTS) == -(-(count - 1) // POINTS):
        assert set(columns(steps[:-1])["version"][:-1]) <= set(kept)


def test_numbers_that_json_does_not_have_become_null() -> None:
    assert columns([step(1, loss=float("nan"), margin=float("inf"))])["loss"] == [None]


class Attached:
    """What the routes need of a catalogue."""

    def __init__(self, place: Place) -> None:
        self.place = place

    async def run_place(self) -> Place:
        return self.place


def routes(place: Place) -> PageRoutes:
    found = PageRoutes()
    found.catalogue = Attached(place)  # type: ignore[assignment]
    return found


def test_many_requests_at_once_cost_one_read(tmp_path: Path, monkeypatch: Any) -> None:
    reads: list[Place] = []
    monkeypatch.setattr(run_view, "view", lambda place: reads.append(place) or {"run": "x"})

    async def ask() -> None:
        asked = routes(Place("p"))
        await asyncio.gather(*(asked.run_view() for _ in range(20)))
        await asked.run_view()

    asyncio.run(ask())
    assert len(reads) == 1


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_directory_that_is_no_run_is_a_503(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ApiError) as refused:
        asyncio.run(routes(Place(str(tmp_path))).run_view())
    assert refused.value.status == 503
    assert str(tmp_path) not in refused.value.message


def test_a_store_that_hangs_is_a_503_and_is_asked_once(tmp_path: Path, monkeypatch: Any) -> None:
    reads, release = [], threading.Event()
    monkeypatch.setattr(run_view, "view", lambda place: reads.append(place) or release.wait(60) or {})
    monkeypatch.setattr(run_view, "READ_TIMEOUT_S", 0.05)

    async def ask() -> None:
        asked = routes(Place("p"))
        for _ in range(3):
            with pytest.raises(ApiError, match="cannot be read"):
                await asked.run_view()
        release.set()

    asyncio.run(ask())
    assert len(reads) == 1


def write_probe(run: Place, version: int, label: str, rewards: list[float | None]) -> None:
    answers = [Answer(str(n), "Why?", "So.", 10 + n, "stop", reward) for n, reward in enumerate(rewards)]
    worse = [replace(answer, reward=-1.0) for answer in answers]
    scores = probe.scores(answers, worse, worse) if version else probe.scores(answers)
    conditions = Conditions(total=len(answers), route="fleet")
    known = {"version": version, "label": label, "model": "m", "seconds": 0.0, "created": 0}
    result = TaskResult(task=probe.TASK, scores=scores, conditions=conditions, **known)
    write_result(run, result, probe.as_jsonl(answers))


def test_the_view_has_the_scores_of_probes_and_the_answers_of_the_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    assert view(run)["probes"] == []
    run.at("evaluations", "000000", "probe", "samples.jsonl").write(b"")
    assert view(run)["probes"] == [], "it is being written"
    write_probe(run, 0, "base", [0.0, 1.0, 2.0])
    write_probe(run, 16, "round-1", [1.0, None, 3.0])
    run.at("evaluations", "000016", "gsm8k", "result.json").write(b"{}")
    base, last = view(run)["probes"]
    assert (base["version"], base["label"], base["answers"]) == (0, "base", [])
    assert last["scores"]["mean_tokens"]["value"] == 11 and "win_rate_base" not in last["scores"], "a reward is missing"
    assert last["answers"] == [(10, 1.0), (12, 3.0)]
    assert json.loads(json.dumps(view(run)))["probes"][1]["answers"] == [[10, 1.0], [12, 3.0]]
