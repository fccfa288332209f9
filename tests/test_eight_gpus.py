"""A whole run on eight GPUs that Ray counts and whose actors compute on CPUs: seven ranks and a live policy."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import write_recipe
from tests.offline.conftest import MARK, free_ports, stop
from tests.waiting import scaled

pytestmark = pytest.mark.slow
GPUS = 8
FREE = "import ray; ray.init(log_to_driver=False); print('free:', ray.available_resources().get('GPU', 0))"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of processes that use a Ray with eight logical GPUs on this machine."""
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: socket paths have a limit
    port, agent = free_ports(2)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", MARK: scratch, "SAMPO_LOGICAL_GPUS": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env |= {"RAY_worker_niceness": "0", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    size = [f"--num-gpus={GPUS}", "--num-cpus=16", "--object-store-memory=300000000"]
    ports = [f"--port={port}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={scratch}"]
    quiet = ["--disable-usage-stats", "--include-dashboard=false"]
    try:
        head = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
        subprocess.run(["ray", "start", "--head", *quiet, *size, *ports], env=head, check=True, timeout=scaled(120))
        yield env
    finally:
        stop(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def test_seven_ranks_and_a_live_policy_train_on_eight_gpus(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_model, 28), tmp_path / "run"
    overrides = ["profile=auto", "trainer.workers=null", "rounds.count=1", "optim.batch_size=14", "serve.port=0"]
    overrides += ["serve.enabled=true", "trainer.zero_stage=3", "publish.every_steps=1"]
    command = [sys.executable, "-m", "sampo_ray", "train", str(recipe), *overrides]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1
    )
    assert process.stdout is not None
    said, free = [], ""
    for line in process.stdout:
        said.append(line)
        if "live policy:" in line:  # the start is over: all actors have what they asked for
            looked = subprocess.run([sys.executable, "-c", FREE], env=environment, capture_output=True, text=True)
            free = looked.stdout
    assert process.wait(timeout=scaled(60)) == 0, "".join(said)
    assert free.splitlines()[-1:] == ["free: 0"], free
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["profile"], config["trainer"]["workers"], config["reference"]["where"]) == ("cluster", 7, "trainer")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["margin"] == 0.0 and steps[1]["margin"] != 0.0
    AutoModelForCausalLM.from_pretrained(run / "exports" / "round-1")
