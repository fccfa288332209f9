"""Fixtures shared by all tests: a tiny model, pairs for it, and one Ray for the session."""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, settings

from sampo_ray.training.batching import Pair
from tests.waiting import SLOWNESS, TEST_S, scaled

# A busy machine is no failure.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray starts its workers with niceness 15: next to other work they would get a thirtieth of a core, and time out.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads would wait for each other at every layer of a tiny model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is fast comes first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test has the time that this machine, as busy as it is, needs for it."""
    SLOWNESS.look()
    if not item.get_closest_marker("timeout"):
        item.add_marker(pytest.mark.timeout(scaled(TEST_S)))
    return (yield)


Found = TypeVar("Found")


def require(found: Found | None, what: str) -> Found:
    """`found`. Without it the tests that need `what` are skipped; where CI is set, as in .ci/run, they fail."""
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{what} is not installed", pytrace=False)
    if found is None:
        pytest.skip(f"{what} is not installed", allow_module_level=True)
    return found


ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

TEXTS = ["What is two plus three? The answer is five. Let me think about it.", "hello world, this is some text"] * 8


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside a checkout; the project does not need it."""
    if not SHARED.is_dir():
        pytest.skip("real data (../shared) is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers and a byte-level tokenizer, as a Hugging Face folder."""
    from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer(TEXTS)
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_pairs(
    count: int, seed: int = 0, longest: int = 40, vocabulary: int = 256, prompts: int | None = None
) -> list[Pair]:
    """Pairs of random tokens, prompts and responses of 1 to `longest` tokens; `prompts`: so many different prompts,
    which take turns.
    """
    rng = np.random.default_rng(seed)

    def sequences(different: int = count) -> list[np.ndarray]:
        found = [rng.integers(5, vocabulary, rng.integers(1, longest + 1)) for _ in range(different)]
        return [found[i % different].astype(np.int32) for i in range(count)]

    sides = zip(sequences(prompts or count), sequences(), sequences(), strict=True)
    return [Pair(f"pair-{i}", *each) for i, each in enumerate(sides)]


def with_reference(policy: Any, pairs: list[Pair]) -> list[Pair]:
    """The pairs with the policy's own log-probs, each scored alone, as their reference's."""
    from sampo_ray.config.rows import RowBudget
    from sampo_ray.training.policy import score_pairs

    return score_pairs(policy, pairs, RowBudget(batch_size=1, tokens_per_row=1 << 20))


def assert_own_logprobs(completions: pa.Table, folder: str, greedy: bool = False) -> None:
    """Each token has the log-prob that the model in `folder` gives it by an independent forward, and, if `greedy`, is
    (nearly) the likeliest.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for row in completions.to_pylist():
        ids = torch.tensor([row["prompt"] + row["completion"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(row["prompt"]) - 1 : -1].float().log_softmax(-1)
        sampled = logprobs.gather(1, torch.tensor(row["completion"])[:, None])[:, 0]
        assert not greedy or (logprobs.max(1).values - sampled).max() < 0.06
        assert (torch.tensor(row["logprobs"]) - sampled).abs().max() < 0.06


def assert_greedy(completions: pa.Table, folder: str) -> None:
    assert_own_logprobs(completions, folder, greedy=True)


def write_recipe(folder: Path, model: Path, pairs: int) -> Path:
    """An offline recipe of two rounds and two ranks on made-up pairs, four a step, with a checkpoint at each step."""
    words = " ".join(TEXTS[:2]).split()
    rows = [
        {
            "prompt": f"Say {' '.join(words[i % 9 : i % 9 + 4])}",
            "chosen": " ".join(words[i % 5 : i % 5 + 3 + i % 7]),
            "rejected": " ".join(words[i % 7 : i % 7 + 12 - i % 6]),
        }
        for i in range(pairs)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tree = {
        "model": {"path": str(model)},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 128},
        "rounds": {"count": 2},
        "optim": {"batch_size": 4, "learning_rate": 1e-3},
        "trainer": {"workers": 2, "checkpoint_every": 1},
        "publish": {"every_steps": 1},
        "serve": {"enabled": False},
        "profile": "laptop",
        "run": {"dir": str(folder / "run")},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server on this machine, empty, and the environment by which a user would name it."""
    command = [sys.executable, "-m", "tests.s3_server"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(line.split()[-1] for line in server.stderr if "Running on" in line)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # else it would wait for a reader
            keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
            yield {"AWS_ENDPOINT_URL": url, **keys}
        finally:
            server.kill()


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all tests, with more logical CPUs than cores."""
    import ray

    from sampo_ray.internals.ray import allow_slow_start

    allow_slow_start()
    ray.init(
        address="local", num_cpus=16, object_store_memory=700_000_000, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def own_serve(local_ray: None) -> Iterator[None]:
    """Ray Serve for one module: the first to start it decides its address, so none is left to the next."""
    from ray import serve

    yield
    serve.shutdown()
