"""The run directory: written atomically by one process, and what is finished stays finished."""

import json
import multiprocessing
import os
import threading
import time
import uuid

import filelock
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampo_ray.config.run import load_config
from sampo_ray.errors import ConfigError, DataError, RunLostError
from sampo_ray.run import lock
from sampo_ray.run.directory import create_run, open_run
from sampo_ray.run.lock import Lease, exclusive
from sampo_ray.run.manifest import (
    Checkpoint,
    DataRecord,
    Manifest,
    RoundRecord,
    StageRecord,
    StepMetrics,
    parse_metrics,
)
from sampo_ray.run.storage import Place
from sampo_ray.sources.records import is_here
from tests.waiting import scaled, wait_until


def new_run(folder):
    return create_run(load_config({"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(folder)}}))


def test_a_run_reads_back_as_it_was_saved(tmp_path):
    run = new_run(tmp_path / "run")
    run.round(0).stages["pairs"] = StageRecord(rows=[3, 4], seconds=0.1)
    run.save()
    again = open_run(str(tmp_path / "run"))
    assert again.id == run.id and again.config == run.config
    assert again.round(0).stages["pairs"].rows == [3, 4]


def test_a_directory_that_holds_a_run_is_not_begun_again(tmp_path):
    new_run(tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        new_run(tmp_path)


def test_a_directory_without_a_run_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(str(tmp_path))


def test_a_round_starts_from_the_version_that_ended_the_one_before(tmp_path):
    run = new_run(tmp_path)
    run.round(0).steps = 7
    run.round(1).steps = 5
    assert [run.round(i).start_version for i in range(3)] == [0, 7, 12]


def test_a_step_is_recorded_once_and_a_line_cut_short_is_ignored(tmp_path):
    run = new_run(tmp_path)
    for loss in (1.0, 2.0):
        run.record(StepMetrics(0, 1, 1, {"loss": loss}))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 0, "st')
    again = open_run(str(tmp_path))
    assert [step.values["loss"] for step in again.metrics()] == [1.0]


@pytest.mark.parametrize("url", ["{}/run", "memory://cut-short-run"])
def test_a_step_whose_line_was_cut_short_is_recorded_again(tmp_path, url):
    url, steps = url.format(tmp_path), [StepMetrics(0, step, step, {"loss": 1.0 / step}) for step in (1, 2, 3)]
    run = new_run(url)
    for step in steps[:2]:
        run.record(step)
    file = run.place.at("metrics.jsonl")
    file.write(file.read()[:-20])
    again = open_run(url)
    assert again.metrics() == steps[:1]
    for step in steps[1:]:
        again.record(step)
    assert open_run(url).metrics() == steps


def test_a_step_that_could_not_be_written_is_not_taken_for_recorded(tmp_path, monkeypatch):
    run, step = new_run(tmp_path), StepMetrics(0, 1, 1, {"loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run.record(step)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    run.record(step)
    assert run.metrics() == [step]


def test_a_line_that_is_no_step_is_named(tmp_path):
    run = new_run(tmp_path)
    for content, words in ((b"hello\n", "line 1: is no JSON object"), (b'{"loss": 1}\n', "does not name round")):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words):
            run.metrics()


def _hold(url, held, release):
    with exclusive(url):
        held.set()
        release.wait(scaled(30))


def test_a_second_process_on_the_same_run_is_refused_until_the_first_is_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, release))
    other.start()
    assert held.wait(scaled(60))
    with pytest.raises(ConfigError, match="in use by another process"), exclusive(str(tmp_path)):
        pass
    other.kill()
    other.join(scaled(10))
    with exclusive(str(tmp_path)):
        pass


def test_a_run_directory_is_free_again_at_once(tmp_path):
    with exclusive(str(tmp_path)):
        held = filelock.FileLock(str(tmp_path / "lock"))
        with pytest.raises(filelock.Timeout):
            held.acquire(timeout=0)
    held.acquire(timeout=0)


@pytest.fixture
def lease(monkeypatch):
    """The lease of a remote run directory that is renewed four times in the seconds that it lasts."""
    monkeypatch.setattr(lock, "LEASE_S", scaled(4.0))
    monkeypatch.setattr(lock, "SETTLE_S", 0.02)
    file = Place(f"memory://{uuid.uuid4().hex}/lease.json")
    yield file
    file.remove()


def write_lease(file, owner, age=0.0):
    file.write(json.dumps({"owner": owner, "time": time.time() - age}).encode())


def test_a_lease_is_renewed_while_it_is_held_and_then_given_back(lease, monkeypatch):
    url = lease.url.removesuffix("/lease.json")
    with exclusive(url) as check:
        first = lease.read()
        with monkeypatch.context() as unreachable:  # for less than a lease lasts
            unreachable.setattr(Place, "exists", lambda self: (_ for _ in ()).throw(OSError("storage is away")))
            time.sleep(1.2)
        wait_until(lambda: lease.read() != first, "renewed lease")
        check()
        with pytest.raises(ConfigError, match="in use by another process"), exclusive(url):
            pass
    assert not lease.exists()


@pytest.mark.parametrize("content", [b"", b'{"owner": "a', b"[]"])
def test_a_lease_that_ended_or_cannot_be_read_is_taken(lease, content):
    url = lease.url.removesuffix("/lease.json")
    lease.write(content)
    with exclusive(url):
        pass
    write_lease(lease, "who died", age=scaled(5.0))
    with exclusive(url):
        pass


def test_of_processes_that_find_a_lease_free_at_once_one_has_it(lease, monkeypatch):
    url, ends, over = lease.url.removesuffix("/lease.json"), [], threading.Barrier(4)
    found_free, written, write = threading.Barrier(3), threading.Barrier(3), Lease._write

    def write_with_the_others(self):
        found_free.wait(scaled(30))
        write(self)
        written.wait(scaled(30))

    monkeypatch.setattr(Lease, "_write", write_with_the_others)

    def hold():
        try:
            with exclusive(url):
                ends.append("held")
                over.wait(scaled(30))
        except ConfigError:
            ends.append("refused")
            over.wait(scaled(30))

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(ends) == 3, "end of three attempts")
    monkeypatch.setattr(Lease, "_write", write)
    over.wait(scaled(30))
    for thread in threads:
        thread.join(scaled(30))
    assert sorted(ends) == ["held", "refused", "refused"]


def test_a_run_that_another_process_has_taken_over_is_not_written_to(lease):
    url = lease.url.removesuffix("/lease.json")
    with exclusive(url) as check:
        run = new_run(url)
        run.check = check
        run.save()
        write_lease(lease, "another")
        with pytest.raises(RunLostError, match="taken over by another process"):
            wait_until(lambda: run.save(), "refusal to write")
        with pytest.raises(RunLostError):
            run.record(StepMetrics(0, 1, 1, {"loss": 0.5}))
        assert run.metrics() == []
    assert json.loads(lease.read())["owner"] == "another", "it is that process's to give back"


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    place = Place(str(tmp_path)).at("deep", "file")
    for content in (b"one", b"two"):
        place.write(content)
    assert place.read() == b"two" and os.listdir(tmp_path / "deep") == ["file"]


@pytest.mark.parametrize("url", ["{}/tables", "file://{}/tables", "memory://tables"])
def test_tables_come_back_from_any_file_system(tmp_path, url):
    place = Place(url.format(tmp_path)).at("part-00000.parquet")
    table = pa.table({"id": ["a", "b"], "tokens": pa.array([[1], [2, 3]], pa.list_(pa.int32()))})
    place.write_table(table)
    assert place.read_table().equals(table) and place.table_rows() == 2
    assert Place(url.format(tmp_path)).names() == ["part-00000.parquet"]


def test_a_remote_run_directory_works_like_a_local_one(tmp_path):
    run = new_run("memory://run-directory")
    run.record(StepMetrics(0, 1, 1, {"loss": 0.5}))
    assert open_run("memory://run-directory").metrics() == run.metrics() != []
    with (
        exclusive("memory://run-directory"),
        pytest.raises(ConfigError, match="in use"),
        exclusive("memory://run-directory"),
    ):
        pass
    draft = tmp_path / "checkpoint"
    draft.mkdir()
    (draft / "state").write_bytes(b"x")
    run.place.at("checkpoints", "0-1").take(draft)
    with run.place.at("checkpoints", "0-1").on_disk() as folder:
        assert (folder / "state").read_bytes() == b"x"


records = st.builds(
    RoundRecord,
    index=st.integers(0, 5),
    start_version=st.integers(0, 100),
    steps=st.none() | st.integers(1, 50),
    stages=st.dictionaries(
        st.sampled_from(["pairs", "train"]),
        st.builds(StageRecord, rows=st.lists(st.integers(0, 9)), dropped=st.just({"tie": 2})),
    ),
    committed=st.booleans(),
)
checkpoints = st.builds(
    Checkpoint,
    path=st.text(max_size=9),
    round=st.integers(0, 5),
    step=st.integers(0, 50),
    world=st.integers(1, 8),
    files=st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
)


data = st.builds(
    DataRecord,
    source=st.text(),
    fingerprint=st.none() | st.text(),
    rows=st.lists(st.integers(1, 9)),
    dropped=st.just({"long": 1}),
)
manifests = st.builds(
    Manifest,
    id=st.text(max_size=8),
    data=data,
    rounds=st.lists(records, max_size=4),
    checkpoint=st.none() | checkpoints,
)


@given(manifests)
@settings(max_examples=50)
def test_any_manifest_survives_being_written(manifest):
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


OLD_MANIFEST = {
    "format": 1,
    "id": "r1",
    "packages": {"ray": "2.60.0", "vllm": None},
    "data": {
        "source": "prompts.jsonl",
        "fingerprint": "abc",
        "rows": [512, 20],
        "rows_read": 540,
        "dropped": {"too long": 8},
        "prompts_cut": 2,
        "responses_cut": 0,
    },
    "rounds": [
        {
            "index": 0,
            "start_version": 0,
            "steps": 4,
            "stages": {
                "feedback": {
                    "rows": [1],
                    "seconds": 0.5,
                    "rows_read": 1,
                    "dropped": {},
                    "prompts_cut": 0,
                    "responses_cut": 0,
                    "votes": 2,
                    "left": {"tie": 1},
                },
                "completions": {"rows": [32], "seconds": 14.2, "age": {"mean": 1.5, "most": 3}},
                "candidates": {"rows": [], "seconds": 0.1, "dropped": {"tie": 2}},
                "train": {"steps": 4, "seconds": 9.0},
            },
            "committed": True,
        },
        {"index": 1, "start_version": 4, "steps": None, "stages": {}, "committed": False},
    ],
    "checkpoint": None,
    "earlier": None,
    "finished": False,
}


@pytest.mark.parametrize("data", [{}, OLD_MANIFEST["data"]])
def test_a_manifest_keeps_every_key_and_gains_none(data):
    old = {**OLD_MANIFEST, "data": data}
    assert json.loads(Manifest.model_validate(old).model_dump_json()) == old


def test_a_line_of_metrics_keeps_its_keys_and_their_order():
    line = '{"loss": 0.5, "grad_norm": null, "skipped": 0.0, "round": 1, "step": 2, "version": 6}'
    [step] = parse_metrics(line.encode())
    assert (step.round, step.step, step.version) == (1, 2, 6) and step.line() == line


def test_paths_of_a_recipe_hold_in_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "judge.py"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    tree = {
        "model": {"path": "model"},
        "data": {"train": "pairs.jsonl", "prompts": "org/on-the-hub"},
        "reward": {"function": "judge.py:reward"},
        "run": {"dir": "run"},
    }
    config = create_run(load_config(tree)).config
    assert is_here("model:train") and not is_here("org/name:train") and not is_here("s3://bucket/a*.jsonl")
    for source in ("model:train", "model/*/a-?.jsonl", "*.jsonl"):
        found = create_run(
            load_config(tree, [f"data.train='{source}'", f"run.dir=run-{len(source)}"])
        ).config.data.train
        assert found == str(tmp_path / source)
    several = load_config(tree, ["data.train=[pairs.jsonl, org/on-the-hub, 'model:train']", "run.dir=several"])
    found = create_run(several).config.data.train
    assert found == (str(tmp_path / "pairs.jsonl"), "org/on-the-hub", str(tmp_path / "model:train"))
    assert config.model.path == str(tmp_path / "model")
    assert config.data.train == str(tmp_path / "pairs.jsonl") and config.data.prompts == "org/on-the-hub"
    assert config.reward.function == f"{tmp_path / 'judge.py'}:reward"
