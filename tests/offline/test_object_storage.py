"""A whole run on object storage, through the command line: kill -9 in a round, and the bits of a local run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from sampo_ray.console.main import app
from sampo_ray.run import lines
from sampo_ray.run.directory import open_run
from sampo_ray.run.node_copies import version_on_disk
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import complete_versions, read_info
from tests.offline.test_training import facts, same_bits
from tests.waiting import scaled, wait_until

from .conftest import STEPS, finish

pytestmark = pytest.mark.slow

COMMAND = """
import sys
from sampo_ray.console.main import main
from sampo_ray.run import lock
lock.LEASE_S = float(sys.argv.pop(1))
main()
"""
"""`sampo` with a lease that ends sooner."""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where processes put temporary files: a short path, as sockets are among them."""
    with tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def sampo(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, str(scaled(12.0)), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_run_on_object_storage_that_was_killed_ends_in_the_bits_of_a_local_run(
    submitted: tuple[Path, str], recipe: Path, s3: str, temporary: Path, tmp_path: Path
) -> None:
    local, run = submitted[0], Place(f"{s3}/team/run")
    driver = sampo("train", str(recipe), f"run.dir={run.url}", "reference.where=trainer")

    def midst_of_the_second_round() -> bool:
        assert driver.poll() is None, driver.communicate()[0]
        return run.at("metrics.jsonl").exists() and len(open_run(run.url).metrics()) >= STEPS + 3

    try:
        wait_until(midst_of_the_second_round, "second round", 300)
    finally:
        started = [each for each in psutil.Process(driver.pid).children(recursive=True) if not is_agent(each)]
        driver.kill()
        driver.communicate()
    psutil.wait_procs(started, timeout=scaled(60))
    left_behind(run)
    finish(sampo("train", "--resume", run.url))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(lines.read(run.at("metrics.jsonl")))
    assert facts(tmp_path / "run") == facts(local)
    with run.at("exports", "round-2").on_disk() as export:
        assert same_bits(export, local / "exports" / "round-2")
    manifest = json.loads(run.at("manifest.json").read())
    assert manifest["finished"]
    named = {each["path"].rpartition("/")[2] for each in (manifest["checkpoint"], manifest["earlier"])}
    assert set(run.at("checkpoints").names()) == named, "what the killed ranks left is removed"
    numbers = [int(name) for name in run.at("versions").names()]
    assert numbers == complete_versions(run.at("versions").url)
    both = {*numbers} & {*map(int, os.listdir(local / "versions"))}
    assert both >= {0, STEPS, 2 * STEPS}, "within a round it depends on time which are made"
    for number in both:  # as a replica does
        with version_on_disk(run.at("versions", f"{number:06d}").url) as copy:
            assert same_bits(copy, local / "versions" / f"{number:06d}")
            assert read_info(str(copy)).version == number
    listed = CliRunner().invoke(app, ["versions", run.url])
    assert listed.exit_code == 0 and "final" in listed.output
    assert not list(temporary.glob("sampo-scratch-*")), "no copy of a file is left on this machine"


def is_agent(process: psutil.Process) -> bool:
    """Whether it is one of Ray's agents, which may stay for a minute and write nothing of a run."""
    try:
        return "agent" in " ".join(process.cmdline()).lower()
    except psutil.Error:
        return False


def left_behind(run: Place) -> None:
    """Adds what processes leave that die while they write: a checkpoint that the manifest does not name, a version
    without its version.json."""
    for name in ("checkpoints/0-000099/state.pt", "versions/000099/model-00001-of-00002.safetensors"):
        run.at(name).write(b"cut short")
