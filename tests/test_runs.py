"""The run directory: written atomically by one process, and what is finished stays finished."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
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
from sampo_ray.run.lock import exclusive
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


@pytest.mark.parametrize("content", [None, b"a: [", b"text", b"\xff\xfe"])
def test_a_configuration_that_is_gone_or_damaged_is_one_message(tmp_path, content):
    run = new_run(tmp_path)
    run.place.at("config.yaml").remove()
    if content is not None:
        run.place.at("config.yaml").write(content)
    with pytest.raises(ConfigError, match=r"config\.yaml (cannot be read|is no configuration).*restore it"):
        open_run(run.place.url)


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
def leased(monkeypatch):
    """A remote run directory whose lease lasts a few seconds."""
    monkeypatch.setattr(lock, "LEASE_S", scaled(2.0))
    return f"memory://{uuid.uuid4().hex}"


def claims(url):
    return {name: json.loads(Place(url).at("lease", name).read())["owner"] for name in Place(url).at("lease").names()}


def test_a_lease_is_renewed_while_it_is_held_and_then_given_back(leased, monkeypatch):
    with exclusive(leased) as check:
        first = claims(leased)
        with monkeypatch.context() as unreachable:  # for less than a lease lasts
            unreachable.setattr(Place, "create", lambda *_: (_ for _ in ()).throw(OSError("storage is away")))
            time.sleep(0.5)
        wait_until(lambda: claims(leased).keys().isdisjoint(first), "renewed lease")
        check()
        check()
        with pytest.raises(ConfigError, match="in use by another process"), exclusive(leased):
            pass
    assert list(claims(leased).values()) == [None]
    with exclusive(leased):
        pass


def test_the_lease_of_a_process_that_was_killed_is_waited_for(leased):
    Place(leased).at("lease", "000000000007.json").write(b'{"owner": "who died"}')
    said, began = [], time.monotonic()
    with exclusive(leased, said.append):
        assert time.monotonic() - began >= lock.LEASE_S and "waiting" in said[0]
        assert "who died" not in claims(leased).values()


@pytest.fixture
def interruptible():
    """Tests in a script's background job do not hear SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_that_another_process_has_taken_over_stops_and_is_not_written_to(leased, interruptible):
    with pytest.raises(RunLostError, match="taken over by another process"), exclusive(leased) as check:
        run = new_run(leased)
        run.check = check
        latest = int(max(claims(leased)).partition(".")[0])
        while not Place(leased).at("lease", f"{(latest := latest + 1):012d}.json").create(b'{"owner": "another"}'):
            pass  # it was renewed just now
        time.sleep(scaled(60))
    for write in (run.save, lambda: run.record(StepMetrics(0, 1, 1, {"loss": 0.5}))):
        with pytest.raises(RunLostError):
            write()
    assert run.metrics() == []
    assert claims(leased)[max(claims(leased))] == "another", "it is that process's to give back"


WAITS = """
import signal, sys, threading, time, fsspec
from sampo_ray.run import lock
from sampo_ray.run.storage import Place
from sampo_ray.console.signals import orderly_end
lock.LEASE_S = 2.0
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
with orderly_end(), lock.exclusive("memory://run") as check:
    Place.create = lambda *_: (_ for _ in ()).throw(OSError("storage is away"))
    threading.Event().wait(600)  # as for a step that takes long
"""


@pytest.mark.parametrize("interrupt", ["default_int_handler", "SIG_IGN"])
def test_a_run_whose_lease_cannot_be_renewed_stops_wherever_it_waits_in_the_background_too(interrupt):
    done = subprocess.run([sys.executable, "-c", WAITS, interrupt], capture_output=True, text=True, timeout=scaled(60))
    assert "RunLostError: run.dir='memory://run' has not been reached for 2 s" in done.stderr


TAKES = """
import sys, time
from sampo_ray.errors import ConfigError
from sampo_ray.run import lock
lock.LEASE_S = float(sys.argv[2])
try:
    with lock.exclusive(sys.argv[1]):
        print("held", flush=True)
        time.sleep(600)
except ConfigError:
    print("refused", flush=True)
"""


def test_of_processes_that_begin_on_object_storage_at_once_one_has_it_and_after_kill_9_the_next(s3):
    def begin():
        command = [sys.executable, "-c", TAKES, f"{s3}/run", str(scaled(3.0))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    racing = [begin() for _ in range(3)]
    try:
        said = [process.stdout.readline().strip() for process in racing]
        assert sorted(said) == ["held", "refused", "refused"]
        racing[said.index("held")].kill()
        racing.append(begin())
        assert racing[-1].stdout.readline().strip() == "held"
    finally:
        for process in racing:
            process.kill()
            process.wait()


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    place = Place(str(tmp_path)).at("deep", "file")
    for content in (b"one", b"two"):
        place.write(content)
    assert place.read() == b"two" and os.listdir(tmp_path / "deep") == ["file"]


def test_a_file_that_is_being_written_is_not_listed(tmp_path, monkeypatch):
    folder, replace, seen = Place(str(tmp_path)), os.replace, []

    def look(draft, path):
        seen.append((folder.names(), len(os.listdir(tmp_path))))
        replace(draft, path)

    monkeypatch.setattr(os, "replace", look)
    folder.at("a.jsonl").write(b"whole")
    folder.at("a.jsonl").write(b"other")
    assert seen == [([], 1), (["a.jsonl"], 2)] and folder.names() == ["a.jsonl"]


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
    draft = tmp_path / "checkpoint"
    draft.mkdir()
    (draft / "state").write_bytes(b"x")
    run.place.at("checkpoints", "0-1").take(draft)
    with run.place.at("checkpoints", "0-1").on_disk() as folder:
        assert (folder / "state").read_bytes() == b"x"


def checkpoint(path):
    return Checkpoint(path=path, round=0, step=1, world=1, files={})


@pytest.mark.parametrize("url", ["{}/run", "memory://left-behind"])
def test_what_killed_processes_left_is_removed_when_a_run_goes_on(tmp_path, url):
    run = new_run(url.format(tmp_path))
    run.manifest.checkpoint, run.manifest.earlier = checkpoint("checkpoints/0-2"), checkpoint("checkpoints/0-1")
    folders = ["checkpoints/0-1", "checkpoints/0-2", "checkpoints/0-3", "versions/000000", "versions/000001"]
    for folder in (*folders, "checkpoints/.draft-x", "versions/.draft-y"):
        run.place.at(folder, "file").write(b"x")
    run.versions.at("000000", "version.json").write(b"{}")
    run.clear_leftovers()
    assert run.place.at("checkpoints").names() == ["0-1", "0-2"] and run.versions.names() == ["000000"]


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
