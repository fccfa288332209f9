"""What offline runs share: a recipe, a Ray cluster of two nodes to run it on as a job, and that run."""

import contextlib
import os
import secrets
import shutil
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

from tests.conftest import write_recipe

STEPS = 8


@pytest.fixture(scope="package")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of eight steps, each of them published and checkpointed."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_model, 4 * STEPS)


@pytest.fixture(scope="package")
def submitted(cluster: "Cluster", recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of a job on the cluster that nobody disturbed, and what was said of it."""
    folder = tmp_path_factory.mktemp("runs") / "submitted"
    command = [sys.executable, "-m", "sampo_ray.cli", "submit", str(recipe), "--address", cluster.address]
    done = subprocess.run([*command, f"run.dir={folder}"], env=cluster.env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


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


@pytest.fixture(scope="package")
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
