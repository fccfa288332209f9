"""Fixtures shared by all tests: a tiny model, pairs for it, and one Ray for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.load_profile("default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

SHARED = Path(__file__).resolve().parents[2] / "shared"

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
    from sampo_ray.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer(TEXTS)
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_pairs(count: int, seed: int = 0, longest: int = 40, vocabulary: int = 256) -> pa.Table:
    """A PAIRS-shaped block of random tokens, prompts and responses of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def sequences() -> list[list[int]]:
        return [rng.integers(5, vocabulary, rng.integers(1, longest + 1)).tolist() for _ in range(count)]

    return pa.table(
        {
            "id": [f"pair-{i}" for i in range(count)],
            **{name: pa.array(sequences(), pa.list_(pa.int32())) for name in ("prompt", "chosen", "rejected")},
        }
    )


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all tests, with more logical CPUs than cores."""
    import ray

    ray.init(
        address="local", num_cpus=16, object_store_memory=700_000_000, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()
