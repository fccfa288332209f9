"""Runs as jobs on an existing cluster."""

import contextlib
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from rich.console import Console

from sampo_ray.cluster import submit as job
from sampo_ray.config import ConfigError
from sampo_ray.recipe import load_config
from tests.conftest import write_recipe

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
    Path("keys.yaml").touch()
    with pytest.raises(ConfigError, match="serve.keys_file='keys.yaml' is a relative path on this machine"):
        job.check_reachable(config("serve.keys_file=keys.yaml"), [])


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


@dataclass(frozen=True)
class Cluster:
    address: str
    env: dict[str, str]
    """For processes that belong to the cluster and for those that talk to it: it asks for a token, as Ray advises."""

    def follower(self, command: str, folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """A process that submits `command` and follows it, writing to `log`."""
        code = (
            "import pathlib, signal, sys; from rich.console import Console\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs are started deaf to it
            "from sampo_ray.cluster.submit import submit_entrypoint\n"
            "sys.exit(submit_entrypoint(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], Console()))"
        )
        with log.open("wb") as out:
            arguments = [sys.executable, "-c", code, command, str(folder), self.address]
            return subprocess.Popen(arguments, env=self.env, stdout=out, stderr=out)

    def run(self, command: str, folder: Path) -> tuple[int, str]:
        """Exit status and output of `command`, run as a job in a copy of `folder`."""
        with tempfile.TemporaryDirectory() as outside:
            log = Path(outside) / "out.log"
            status = self.follower(command, folder, log).wait(timeout=240)
            return status, log.read_text()

    def request(self, method: str, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        return requests.request(method, f"{self.address}{path}", headers=headers, timeout=30)

    def ready(self) -> bool:
        try:
            return self.request("GET", "/api/version").ok
        except requests.RequestException:
            return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes on this machine, started as a user does."""
    gcs, dashboard, ray_client, *agents = free_ports(5)
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: socket paths have a limit
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", MARK: scratch}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    running = Cluster(f"http://127.0.0.1:{dashboard}", env)
    start = ["ray", "start", "--disable-usage-stats", "--num-cpus=4", "--object-store-memory=200000000"]
    # Jobs are taken by a node's agent, whose usual port another Ray on this machine may have.
    agent_ports = [f"--dashboard-agent-listen-port={port}" for port in agents]
    head = [f"--temp-dir={scratch}", "--head", f"--port={gcs}", f"--ray-client-server-port={ray_client}"]
    head += [f"--dashboard-port={dashboard}", agent_ports[0]]
    try:
        subprocess.run([*start, *head], env=env, check=True, timeout=240)
        address = (Path(scratch) / "ray_current_cluster").read_text().strip()
        subprocess.run([*start, agent_ports[1], f"--address={address}"], env=env, check=True, timeout=240)
        wait_until(running.ready, "job server", 120)
        yield running
    finally:
        stop(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


MARK = "SAMPO_TEST_CLUSTER"
"""Every process of the test's cluster inherits this, so that it can be found; `ray stop` would end other people's."""


def stop(scratch: str) -> None:
    processes = [process for process in psutil.process_iter() if mark_of(process) == scratch]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(true: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_job_runs_over_both_nodes_with_the_package_that_travels_with_it(cluster, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import ray, sampo_ray.actors\n"
        "ray.init(log_to_driver=False)\n"
        "print(len(ray.nodes()), 'nodes', sampo_ray.__file__, sampo_ray.actors.__file__)\n"
    )
    status, output = cluster.run("python probe.py", tmp_path)
    assert status == 0, output
    assert "2 nodes" in output and "succeeded" in output
    assert output.count("runtime_resources/py_modules_files") == 2


@pytest.mark.slow
def test_a_job_that_fails_gives_its_status_and_its_last_words(cluster, tmp_path):
    status, output = cluster.run("echo out of luck; exit 3", tmp_path)
    assert status == 3, output
    assert "out of luck" in output and "failed" in output


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_so(cluster, tmp_path):
    stranger = Cluster(cluster.address, {k: v for k, v in cluster.env.items() if not k.startswith("RAY_AUTH")})
    status, output = stranger.run("true", tmp_path)
    assert status == 1
    assert "SubmitError" in output and "RAY_AUTH_TOKEN" in output


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(cluster, tmp_path):
    log, empty = tmp_path / "out.log", tmp_path / "empty"
    empty.mkdir()
    follower = cluster.follower("echo working; sleep 600", empty, log)
    wait_until(lambda: "\nworking" in log.read_text(), "output of the job", 120)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=60) == 130
    job_id = log.read_text().split("job ", 1)[1].split()[0]
    assert f"ray job stop --address {cluster.address} {job_id}" in log.read_text()

    def status() -> str:
        return cluster.request("GET", f"/api/jobs/{job_id}").json()["status"]

    assert status() == "RUNNING"
    cluster.request("POST", f"/api/jobs/{job_id}/stop")
    wait_until(lambda: status() == "STOPPED", "end of the job", 60)


@pytest.mark.slow
def test_a_recipe_trains_as_a_job_on_the_cluster(cluster, tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model, pairs=16)
    command = [sys.executable, "-m", "sampo_ray.cli", "submit", str(recipe), "--address", cluster.address]
    done = subprocess.run(
        [*command, "optim.batch_size=8"], env=cluster.env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 2/2" in done.stdout and "succeeded" in done.stdout
    assert (tmp_path / "run" / "exports" / "round-2" / "version.json").exists()
