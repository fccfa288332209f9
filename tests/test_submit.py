"""Runs as jobs on an existing cluster."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from sampo_ray.cluster import submit as job
from sampo_ray.config import ConfigError, load_config

RECIPE = {"model": {"path": "hub/model"}, "data": {"train": "hub/pairs"}, "run": {"dir": "s3://bucket/run"}}


def config(*overrides: str):
    return load_config(RECIPE, list(overrides))


def test_the_entrypoint_survives_the_shell():
    command = job.entrypoint(Path("some/where/my recipe.yaml"), ["data.train=s3://b/a b.jsonl", "run.seed=3"])
    assert command == "python -m sampo_ray.cli train 'my recipe.yaml' 'data.train=s3://b/a b.jsonl' run.seed=3"


def test_a_run_directory_that_ends_with_the_job_is_refused():
    with pytest.raises(ConfigError, match="run.dir='runs/x' is relative"):
        job.check_reachable(config("run.dir=runs/x"), [])


def test_files_that_only_this_machine_sees_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").touch()
    with pytest.raises(ConfigError, match="data.train='pairs.jsonl' is a relative path on this machine"):
        job.check_reachable(config("data.train=pairs.jsonl"), [])
    job.check_reachable(config("data.train=hub/pairs"), [])


def test_keys_never_go_on_the_command_line():
    overrides = ["serve.api_keys=[secret]"]
    with pytest.raises(ConfigError, match=r"serve\.api_keys") as refused:
        job.check_reachable(config(*overrides), overrides)
    assert "secret]" not in str(refused.value)


def test_a_reward_file_travels_with_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/reward.py").write_text("def score(prompts, completions): ...")
    Path("recipe.yaml").write_text("{}")
    folder = tmp_path / "staged"
    folder.mkdir()
    job.stage_files(Path("recipe.yaml"), config("reward.function=mine/reward.py:score"), folder)
    assert (folder / "recipe.yaml").exists() and (folder / "mine/reward.py").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8265", "give the URL of the cluster's dashboard"),
        ("http://127.0.0.1:9", "no Ray job server answers there"),
    ],
)
def test_an_address_where_no_cluster_is_gives_one_clear_message(address, message, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(job.SubmitError, match=message):
        job.submit_entrypoint("true", tmp_path, address, Console(file=io.StringIO()))


def test_a_server_that_never_answers_does_not_hold_us_up(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(job, "REQUEST_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(job.SubmitError, match="no Ray job server"):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        job.submit_entrypoint("true", tmp_path, address, Console(file=io.StringIO()))


def test_an_environment_that_would_overrule_the_address_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(job.SubmitError, match="RAY_ADDRESS is set"):
        job.submit_entrypoint("true", tmp_path, "http://127.0.0.1:8265", Console(file=io.StringIO()))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dashboard address of a cluster of two nodes on this machine, started as a user does."""
    gcs, dashboard = free_ports(2)
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: socket paths have a limit
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=4"]
    start += ["--object-store-memory=200000000"]
    head = [
        f"--temp-dir={scratch}",
        "--head",
        f"--port={gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    head += ["--node-ip-address=127.0.0.1", "--ray-client-server-port=0"]
    nodes: list[subprocess.Popen[bytes]] = []
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for options in (head, [f"--address=127.0.0.1:{gcs}", "--node-ip-address=127.0.0.1"]):
            with open(Path(scratch) / f"node-{len(nodes)}.log", "wb") as log:
                nodes.append(subprocess.Popen([*start, *options], env=env, cwd=scratch, stdout=log, stderr=log))
            wait_until(lambda: alive_nodes(address) == len(nodes), f"{len(nodes)} nodes", 120)
        yield address
    finally:
        stop(nodes)
        shutil.rmtree(scratch, ignore_errors=True)


def alive_nodes(address: str) -> int:
    try:
        listed = requests.get(f"{address}/api/v0/nodes", timeout=10).json()
        return sum(node["state"] == "ALIVE" for node in listed["data"]["result"]["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def wait_until(true, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.5)


def stop(nodes: list[subprocess.Popen[bytes]]) -> None:
    """Ends these nodes and what they started, by process id: other clusters of this machine stay."""
    running = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    family = [*running, *(child for node in running for child in node.children(recursive=True))]
    for node in running:
        node.terminate()
    _, left = psutil.wait_procs(family, timeout=20)
    for process in left:
        process.kill()
    for node in nodes:
        node.wait(timeout=20)


def submitted(command: str, folder: Path, address: str) -> tuple[int, str]:
    out = io.StringIO()
    return job.submit_entrypoint(command, folder, address, Console(file=out)), out.getvalue()


@pytest.mark.slow
def test_a_job_runs_over_both_nodes_with_the_package_that_travels_with_it(cluster, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import ray, sampo_ray.actors\n"
        "ray.init(log_to_driver=False)\n"
        "print(len(ray.nodes()), 'nodes', sampo_ray.__file__, sampo_ray.actors.__file__)\n"
    )
    status, output = submitted("python probe.py", tmp_path, cluster)
    assert status == 0, output
    assert "2 nodes" in output and "succeeded" in output
    assert output.count("runtime_resources/py_modules_files") == 2


@pytest.mark.slow
def test_a_job_that_fails_gives_its_status_and_its_last_words(cluster, tmp_path):
    status, output = submitted("echo out of luck; exit 3", tmp_path, cluster)
    assert status == 3
    assert "out of luck" in output and "failed" in output


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(cluster, tmp_path):
    code = (
        "import sys, pathlib; from rich.console import Console\n"
        "from sampo_ray.cluster.submit import submit_entrypoint\n"
        "sys.exit(submit_entrypoint('echo working; sleep 600', pathlib.Path(sys.argv[1]), sys.argv[2], Console()))"
    )
    log, empty = tmp_path / "out.log", tmp_path / "empty"
    empty.mkdir()
    with log.open("wb") as out:
        follower = subprocess.Popen([sys.executable, "-c", code, str(empty), cluster], stdout=out, stderr=out)
    wait_until(lambda: "\nworking" in log.read_text(), "output of the job", 90)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=60) == 130
    name = log.read_text().split()[1]
    assert f"ray job stop --address {cluster} {name}" in log.read_text()
    client = JobSubmissionClient(cluster)
    assert client.get_job_status(name) == JobStatus.RUNNING
    client.stop_job(name)
    wait_until(lambda: client.get_job_status(name) == JobStatus.STOPPED, "end of the job", 60)
