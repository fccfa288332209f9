"""What outlives what: when a command, a replica or Ray's own process ends, however it ends, so does all it started."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from sampo_ray.config.run import load_config
from sampo_ray.data.chat import ChatFormat
from sampo_ray.run.directory import create_run
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo, version_folder
from tests.conftest import write_recipe
from tests.waiting import scaled, wait_until

logger = logging.getLogger(__name__)

END_S = 30.0
"""Seconds within which all must have ended."""
START_S = 180.0
ENGINE, SPAWNED = "VLLM::EngineCore", "multiprocessing.spawn"
SPAWNS = """
import multiprocessing, os, sys, time
from sampo_ray.internals.processes import bind_spawned_processes

def inner(pids):
    pids.put(os.getpid())
    time.sleep(600)

def outer(pids):
    process = multiprocessing.get_context("spawn").Process(target=inner, args=(pids,))
    process.start()
    pids.put(os.getpid())
    process.join()

if __name__ == "__main__":
    bind_spawned_processes()
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    context.Process(target=outer, args=(pids,)).start()
    print(pids.get(), pids.get(), flush=True)
    time.sleep(600)
"""
STARTS_LATE = """
import os, sys
from sampo_ray.internals.processes import end_with
end_with(int(sys.argv[1]))
print("goes on", flush=True)
"""
SMALL = """
import functools
from sampo_ray.console import demo, main
demo.make_demo = functools.partial(demo.make_demo, sft_steps=1)
main.main()
"""
DRIVER = """
import os, sys, time
import ray
from ray import serve
from sampo_ray.actors.guard import start_guard
from sampo_ray.actors.weights.store import start_weight_store

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Policy:
    pass

ray.init(address=sys.argv[1], namespace="sampo", log_to_driver=False)
for fleet, keeps in (("ends", []), ("stays", ["stays-policy"])):
    ray.get(start_weight_store(f"{fleet}-store", f"{sys.argv[2]}/{fleet}.json").__ray_ready__.remote())
    ray.get(start_guard(fleet, keeps, f"{fleet}-store").__ray_ready__.remote())
    for app in ("policy", "rewards") if keeps else ("policy",):
        serve.run(Policy.bind(), name=f"{fleet}-{app}", route_prefix=None)
print("up", flush=True)
time.sleep(600)
"""


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or only its entry in the table is left."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def what(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:100]}"
    return str(process.pid)


def await_end(processes: list[psutil.Process], limit_s: float = END_S) -> float:
    """Seconds until all have ended; fails with what is left after `limit_s`, however busy it is here, and ends that."""
    begun = time.monotonic()
    while left := [each for each in processes if not has_ended(each)]:
        if time.monotonic() - begun > limit_s:
            names = [what(each) for each in left]
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            raise AssertionError(f"still there after {limit_s:.0f} s: {names}")
        time.sleep(0.1)
    return time.monotonic() - begun


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Names in /dev/shm of what these processes have in memory."""
    found = set[str]()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {each.path for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
    return {path for path in found if os.path.exists(path)}


@dataclass
class Command:
    """A command of `sampo` that runs, and the file that it prints to."""

    process: psutil.Popen
    out: Path

    def all(self) -> list[psutil.Process]:
        """All processes but Ray's agents: those hold no model, and where the GCS has ended as well they try for a
        minute to tell it of their raylet.
        """
        started = self.process.children(recursive=True)
        return [self.process, *(each for each in started if "Agent" not in what(each))]

    def engines(self, name: str = ENGINE) -> list[psutil.Process]:
        """Processes of engines; with SPAWNED, those that still import what they need, too."""
        found = []
        for each in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                parent = each.parent()
                if name in " ".join(each.cmdline()) and parent and "ServeReplica" in " ".join(parent.cmdline()):
                    found.append(each)
        return found

    def wait(self, until: Callable[[], object]) -> None:
        wait_until(lambda: self.process.poll() is not None or until(), "such state", START_S)
        assert self.process.poll() is None, self.out.read_text()

    def await_all_ended(self, everything: list[psutil.Process], memory: set[str]) -> None:
        """Waits for the command itself, and then for what it has started."""
        ended_s = [await_end([self.process]), await_end(everything)]
        logger.warning(f"the command ended in {ended_s[0]:.1f} s, all else {ended_s[1]:.1f} s later")
        assert not {path for path in memory if os.path.exists(path)}


@contextlib.contextmanager
def running(out: Path, *arguments: str, program: Sequence[str] = ("-m", "sampo_ray")) -> Iterator[Command]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with out.open("w") as file:
        process = psutil.Popen([sys.executable, *program, *arguments], stdout=file, stderr=subprocess.STDOUT, env=env)
    command = Command(process, out)
    try:
        yield command
    finally:
        for each in command.all() if process.is_running() else []:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run directory with a version to serve."""
    folder = tmp_path_factory.mktemp("ends")
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "d", "max_length": 128}, "serve": {"port": 0}}
    run = create_run(load_config({**tree, "profile": "laptop", "run": {"dir": str(folder / "run")}}))
    ChatFormat.load(tiny_model, "llama3-sampo").save(folder / "run" / "tokenizer")
    state = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    base = version_folder(run.versions.url, 0)
    write_version(base, state.items(), str(tiny_model), VersionInfo(version=0, round=0, step=0))
    return folder / "run"


def test_what_a_process_spawns_ends_with_it_however_deep(tmp_path: Path) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        spawned = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
        await_end(spawned, 10)


def test_a_process_whose_parent_has_ended_before_it_is_bound_ends_at_once() -> None:
    command = [sys.executable, "-c", STARTS_LATE]
    assert subprocess.run([*command, "1"], capture_output=True, timeout=scaled(60)).stdout == b""
    assert subprocess.run([*command, str(os.getpid())], capture_output=True, timeout=scaled(60)).stdout == b"goes on\n"


@pytest.mark.slow
def test_an_engine_ends_with_its_replica_and_all_of_sampo_serve_on_sigterm(served: Path, tmp_path: Path) -> None:
    with running(tmp_path / "out", "serve", str(served)) as command:
        command.wait(lambda: "serving; Ctrl-C ends it" in command.out.read_text())
        everything, memory = command.all(), shared_memory(command.all())
        (engine,) = command.engines()
        engine.parent().kill()
        logger.warning(f"the engine ended {await_end([engine], 10):.1f} s after its replica")
        everything = [*{*everything, *command.all()}]  # Serve starts another in its place
        command.process.terminate()
        command.await_all_ended(everything, memory)
        # Serve waits for the replica that it starts, on a busy machine beyond the command's own limit.
        assert command.process.wait() in (0, -signal.SIGALRM)


@pytest.mark.slow
def test_nothing_of_sampo_train_outlives_it_when_it_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_model, pairs=8)
    with running(tmp_path / "out", "train", str(recipe), "serve.enabled=true", "serve.port=0") as command:
        command.wait(lambda: command.engines(SPAWNED))
        everything, memory = command.all(), shared_memory(command.all())
        command.process.kill()
        command.await_all_ended(everything, memory)


@pytest.mark.slow
def test_nothing_of_sampo_demo_outlives_rays_own_process(tmp_path: Path) -> None:
    with running(tmp_path / "out", "demo", "--dir", str(tmp_path), program=("-c", SMALL)) as command:
        command.wait(lambda: command.engines(SPAWNED))
        everything, memory = command.all(), shared_memory(command.all())
        (raylet,) = [each for each in everything if each.name() == "raylet"]
        raylet.kill()
        others = [each for each in everything if each.pid != command.process.pid]
        logger.warning(f"ended {await_end(others):.1f} s after the raylet")
        command.process.terminate()
        command.await_all_ended(everything, memory)


@pytest.mark.slow
def test_on_a_shared_cluster_a_fleet_ends_when_its_driver_is_killed(local_ray: None, tmp_path: Path) -> None:
    from ray import serve

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "up\n"
        driver.kill()

    def left() -> list[str]:
        actors = {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}
        ours = {"ends-store", "stays-store", "sampo-ends-guard", "sampo-stays-guard"}
        return sorted(
            [*(actors & ours), *(name for name in serve.status().applications if name.startswith(("ends-", "stays-")))]
        )

    begun = time.monotonic()
    wait_until(lambda: left() == ["stays-policy", "stays-store"], "end of the fleet", END_S, every=0.5)
    logger.warning("the fleet ended %.1f s after its driver", time.monotonic() - begun)
    ray.kill(ray.get_actor("stays-store", namespace="sampo"))
    serve.shutdown()
