"""What offline runs share: a recipe, a Ray cluster of two nodes to run it on as a job, and that run."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.conftest import write_recipe
from tests.waiting import scaled, wait_until

STEPS = 8


@pytest.fixture(scope="package")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of eight steps, each of them published and checkpointed."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_model, 4 * STEPS)


@pytest.fixture(scope="package")
def submitted(cluster: "Cluster", recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of a job on the cluster that nobody disturbed, and what was said of it."""
    folder = tmp_path_factory.mktemp("runs") / "submitted"
    said = finish(cluster.submit(recipe, f"run.dir={folder}"))
    return folder, said


def finish(process: subprocess.Popen[str]) -> str:
    """What it said; it must end well."""
    output, _ = process.communicate(timeout=scaled(500))
    assert process.returncode == 0, output
    return output


@dataclass(frozen=True)
class Cluster:
    address: str
    env: dict[str, str]
    """For processes that belong to the cluster and for those that talk to it: it asks for a token, as Ray advises."""

    def start_node(self, *options: str) -> None:
        """As a user does. Jobs are taken by a node's agent, whose usual port another Ray on this machine may have."""
        size = ["--num-cpus=4", "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        subprocess.run(
            ["ray", "start", "--disable-usage-stats", *size, *options], env=self.env, check=True, timeout=scaled(240)
        )

    def join(self) -> None:
        """One more node."""
        address = (Path(self.env[MARK]) / "ray_current_cluster").read_text().strip()
        self.start_node(f"--address={address}")

    def raylets(self) -> list[psutil.Process]:
        """Of the nodes, the head's first."""
        found = [process for process in members(self.env[MARK]) if process.name() == "raylet"]
        return sorted(found, key=psutil.Process.create_time)

    def driver(self, run: Path) -> psutil.Process:
        """The process of the job that trains in `run`."""
        (found,) = [
            process
            for process in members(self.env[MARK])
            if f"run.dir={run}" in process.cmdline() and "-m" in process.cmdline() and "train" in process.cmdline()
        ]
        return found

    def submit(self, recipe: Path, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sampo_ray", "submit", str(recipe), "--address", self.address, *overrides]
        return subprocess.Popen(command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

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
            status = self.follower(command, folder, log).wait(timeout=scaled(240))
            return status, log.read_text()

    def stop_jobs(self) -> None:
        for job in self.request("GET", "/api/jobs/").json():
            if job["status"] == "RUNNING":
                self.request("POST", f"/api/jobs/{job['submission_id']}/stop").raise_for_status()

    def request(self, method: str, path: str, data: bytes | None = None) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        return requests.request(method, f"{self.address}{path}", headers=headers, data=data, timeout=scaled(60))

    def ready(self) -> bool:
        try:
            return self.request("GET", "/api/version").ok
        except requests.RequestException:
            return False


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes on this machine, started as a user does."""
    gcs, dashboard, ray_client = free_ports(3)
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: socket paths have a limit
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", MARK: scratch}
    env |= {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    running = Cluster(f"http://127.0.0.1:{dashboard}", env)
    ports = [f"--port={gcs}", f"--ray-client-server-port={ray_client}", f"--dashboard-port={dashboard}"]
    try:
        running.start_node("--head", f"--temp-dir={scratch}", *ports)
        running.join()
        wait_until(running.ready, "job server", 120)
        yield running
    finally:
        stop(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


MARK = "SAMPO_TEST_CLUSTER"
"""Every process of the test's cluster inherits this (the scratch folder's name), so that it can be found; `ray stop`
would end other people's.
"""


def stop(scratch: str) -> None:
    processes = members(scratch)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=scaled(20))


def members(scratch: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if mark_of(process) == scratch]


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
