"""Offline runs through the command line, on real Ray Train and DeepSpeed: what they leave behind, and kill -9 at any
time.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sampo_ray.config.run import load_config
from sampo_ray.console.main import app
from sampo_ray.run.directory import create_run
from tests.waiting import scaled, wait_until

from .conftest import STEPS, Cluster, finish

pytestmark = pytest.mark.slow


def resumed(run: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sampo_ray", "train", "--resume", str(run), *overrides]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="package")
def undisturbed(submitted: tuple[Path, str]) -> Path:
    """The run directory of a run that nobody killed."""
    return submitted[0]


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def facts(run: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in metrics(run)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bits(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def damage(run: Path) -> None:
    """Changes a byte of the last checkpoint, and leaves what rank and driver do that die while they write."""
    newest = json.loads((run / "manifest.json").read_text())["checkpoint"]
    file = run / newest["path"] / sorted(newest["files"])[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (run / "checkpoints" / ".draft-left" / "state").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.')


def ranks_under(parent: psutil.Process) -> list[psutil.Process]:
    return [p for p in parent.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def await_steps(steps: int, run: Path, process: subprocess.Popen) -> None:
    def taken() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return len(metrics(run)) >= steps

    wait_until(taken, f"step {steps}", 300)


def test_a_run_begins_at_ln_two_and_learns(undisturbed):
    lines = metrics(undisturbed)
    assert [(line["round"], line["step"]) for line in lines] == [(r, s) for r in (0, 1) for s in range(1, STEPS + 1)]
    for first in (lines[0], lines[STEPS]):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["margin"] == 0.0, "policy and reference are the same weights: exactly"
    assert lines[-1]["margin"] > 0
    assert [line["version"] for line in lines] == list(range(1, 2 * STEPS + 1))


def test_a_run_directory_holds_settings_metrics_versions_checkpoints_and_exports(undisturbed):
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "tensorboard", "exports"} <= set(os.listdir(undisturbed))
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["finished"] and all(record["committed"] for record in manifest["rounds"])
    assert manifest["packages"]["ray"] and manifest["data"]["fingerprint"]
    table = pq.read_table(undisturbed / "rounds" / "1" / "reference" / "part-00000.parquet")
    for side in ("chosen", "rejected"):
        counts = [
            (len(t), len(r)) for t, r in zip(table[side].to_pylist(), table[f"{side}_ref"].to_pylist(), strict=True)
        ]
        assert all(tokens == logprobs > 0 for tokens, logprobs in counts)
    versions = sorted(int(name) for name in os.listdir(undisturbed / "versions"))
    assert {0, STEPS, 2 * STEPS} <= set(versions), "base and ends of rounds"
    assert 1 <= len(versions) - 3 <= 2, "and of those within rounds the last two; a step may have overtaken the others"
    kept = [f"checkpoints/{name}" for name in os.listdir(undisturbed / "checkpoints")]
    assert sorted(kept) == [manifest["earlier"]["path"], manifest["checkpoint"]["path"]]


def test_an_export_loads_as_any_model_does(undisturbed, tiny_model):
    export = AutoModelForCausalLM.from_pretrained(undisturbed / "exports" / "round-2", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
    assert export.dtype == base.dtype == torch.bfloat16
    moved = [not torch.equal(a.float(), b.float()) for a, b in zip(export.parameters(), base.parameters(), strict=True)]
    assert any(moved)


def test_a_job_that_lost_a_node_and_then_its_driver_ends_in_the_same_bits(
    cluster: Cluster, undisturbed, recipe, tmp_path
):
    """kill -9 of the raylet, and with it of the rank and all else that runs on the node, which comes back; and then of
    the driver. Nor does it matter that the rest of the run is no job, who computes the reference, whether ranks live
    for the run or for a round, or that the last checkpoint, a line of metrics and what is served are damaged.
    """
    run = tmp_path / "run"
    # No room for both ranks on one node.
    job = cluster.submit(recipe, f"run.dir={run}", "trainer.num_cpus=3", "reference.where=trainer")
    await_steps(3, run, job)
    _, second = cluster.raylets()
    assert len(ranks_under(second)) == 1
    second.kill()
    cluster.join()
    (run / "serving.json").write_text("damaged, which is no fault of the training")
    await_steps(STEPS + 5, run, job)
    driver = cluster.driver(run)
    driver.suspend()  # it cannot finish now, and still holds the lock of the run
    second = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert "in use by another process" in second.output and second.exit_code == 1
    driver.kill()
    assert job.wait(scaled(120)) != 0
    (run / "serving.json").unlink(missing_ok=True)
    damage(run)
    scored = run / "rounds" / "1" / "reference" / "part-00000.parquet"
    before = scored.stat().st_mtime_ns
    finish(resumed(run, "trainer.lifetime=round", "trainer.num_cpus=0.5"))
    assert scored.stat().st_mtime_ns == before, "nothing stored is scored twice"
    assert not list((run / "checkpoints").glob(".*"))
    assert same_bits(run / "exports" / "round-2", undisturbed / "exports" / "round-2")
    assert facts(run) == facts(undisturbed)
    expected, found = (
        pq.read_table(folder / "rounds" / "1" / "reference" / scored.name) for folder in (undisturbed, run)
    )
    assert found.equals(expected)
    assert "is finished" in CliRunner().invoke(app, ["train", "--resume", str(run)]).output


HURRIED = """
import sys
from sampo_ray.actors.ranks import trainer
from sampo_ray.console.main import main
trainer.ELASTIC_S = 5
sys.argv = ["sampo", "train", *sys.argv[1:]]
main()
"""
"""`sampo train` whose ranks wait for others, and look for room for more, in fewer seconds."""


def test_a_job_continues_with_as_many_ranks_as_there_is_room_for(cluster: Cluster, recipe, tmp_path):
    """One, once kill -9 of a raylet has taken the node of the other, and again two when it is back."""
    run, folder = tmp_path / "run", tmp_path / "job"
    folder.mkdir()
    (folder / "hurried.py").write_text(HURRIED)
    settings = ["trainer.num_cpus=3", "trainer.min_workers=1", "rounds.epochs=200"]
    job = cluster.follower(f"python hurried.py {recipe} run.dir={run} {' '.join(settings)}", folder, tmp_path / "log")
    try:
        await_steps(3, run, job)
        cluster.raylets()[1].kill()
        wait_until(lambda: ranks_of_checkpoint(run) == 1, "step of one rank", 200)
        cluster.join()
        wait_until(lambda: ranks_of_checkpoint(run) == 2, "step of both ranks", 200)
    finally:
        cluster.stop_jobs()
        job.wait(scaled(120))
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)), "each step is recorded once"


def ranks_of_checkpoint(run: Path) -> int | None:
    """None before there is one, which is complete some steps after its own."""
    checkpoint = json.loads((run / "manifest.json").read_text())["checkpoint"]
    return checkpoint and checkpoint["world"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=none.jsonl"], ["none.jsonl"]),
        (["model.path=/nowhere"], ["model.path='/nowhere'"]),
        (["data.max_length=5000"], ["data.max_length=5000", "1024"]),
        (["optim.learning_rat=1"], ["learning_rate"]),
    ],
)
def test_errors_in_a_recipe_are_reported_before_anything_starts(recipe, tmp_path, overrides, words):
    result = CliRunner().invoke(app, ["train", str(recipe), f"run.dir={tmp_path / 'run'}", *overrides])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert all(word in result.output for word in words)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_resolved_configuration_and_starts_nothing(recipe, tmp_path):
    result = CliRunner().invoke(app, ["train", str(recipe), f"run.dir={tmp_path / 'run'}", "--dry-run"])
    assert yaml.safe_load(result.output)["trainer"]["workers"] == 2
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_run_that_goes_on_leaves_it_alone(recipe, tmp_path):
    run = create_run(load_config(recipe, [f"run.dir={tmp_path / 'run'}"])).place.path
    before = sorted(os.listdir(run))
    result = CliRunner().invoke(app, ["train", "--resume", run, "--dry-run", "trainer.workers=1"])
    assert yaml.safe_load(result.output)["trainer"]["workers"] == 1
    refused = CliRunner().invoke(app, ["train", "--resume", run, "--dry-run", "optim.batch_size=2"])
    assert refused.exit_code == 1 and "a resumed run keeps its method" in refused.output
    assert sorted(os.listdir(run)) == before
