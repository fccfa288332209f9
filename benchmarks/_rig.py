"""A policy application as a run has it, on a model of one's choice, for benchmarks to measure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

CONTEXT = 768
RUN = "bench"
TOPICS = (
    "rivers",
    "glaciers",
    "bridges",
    "lanterns",
    "orchards",
    "violins",
    "harbours",
    "meteors",
    "gardens",
    "markets",
)
FORMS = ("note", "letter", "summary", "question", "story", "list", "warning", "joke", "poem", "headline")
READERS = ("child", "farmer", "sailor", "nurse", "pilot", "baker", "judge", "student", "mayor", "painter")
COMMON = (
    "You help the editors of a small magazine that comes out every month and is read by people of all ages. They send "
    "you short orders for texts, and you answer with the text alone, without a greeting or a comment of your own. Use "
    "plain words and short sentences. Write in the present tense unless the order asks for something else. Do not name "
    "real people, companies or places. A letter begins with the name of its reader and ends with yours. A list has at "
    "least four entries, each on its own line. A poem need not rhyme. A joke must be one that a teacher could tell "
    "in front of a class. When an order cannot be met as it is written, meet the part that can be met, and say nothing "
    "of the rest. The number of an order is for the files of the editors and never belongs in the text. Here is one. "
)
"""What all prompts begin with, as an application's do. It is longer than a block of vLLM's prefix cache (128 tokens on
CPUs, 16 on GPUs), or there would be nothing that the cache keeps.
"""


def messages(index: int) -> list[dict[str, str]]:
    """The index-th prompt: all are different, and of about one length."""
    topic, form, reader = TOPICS[index % 10], FORMS[index // 10 % 10], READERS[index // 100 % 10]
    return [{"role": "user", "content": f"{COMMON}Write a {form} about {topic} for a {reader}, number {index}."}]


@dataclass(frozen=True)
class Rig:
    """A running weight store and policy application on version 0 of `versions`, rendered with `chat`.

    `config` says where Serve listens.
    """

    folder: Path
    model: str
    label: str
    store: Any
    policy: Any
    chat: Any
    config: Any

    @property
    def versions(self) -> str:
        return str(self.folder / "versions")

    def prompts(self, first: int, count: int) -> pa.Table:
        """A PROMPTS block."""
        import pyarrow as pa

        turns = [messages(index) for index in range(first, first + count)]
        return pa.table(
            {
                "id": [f"prompt-{index}" for index in range(first, first + count)],
                "messages": [json.dumps(each) for each in turns],
                "columns": ["{}"] * count,
                "prompt": pa.array([self.chat.prompt_ids(each) for each in turns], pa.list_(pa.int32())),
            }
        )


def quiet() -> None:
    """Before Ray, vLLM or transformers are imported: no network, and nothing but results on the terminal."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def model_folder(path: Path | None, folder: Path) -> tuple[str, str]:
    """The model to measure with, and what to call it: `path`, or a random Llama of 5 million parameters made here."""
    if path is not None:
        return str(path.resolve()), path.name
    from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer([messages(index)[0]["content"] for index in range(500)])
    model = tiny_llama(tokenizer, hidden=256, layers=6)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return str(folder / "model"), f"a random Llama of {millions:.1f}M parameters"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sampo-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def policy_rig(folder: Path, model: Path | None, concurrency: int, **engine: Any) -> Iterator[Rig]:
    """Starts Ray, Serve, a weight store and the policy application (`engine`: vLLM's settings besides ours); takes them
    down afterwards.
    """
    import ray
    import torch
    from ray import serve
    from transformers import AutoModelForCausalLM

    from sampo_ray.actors.policy.deployment import policy_deployment
    from sampo_ray.actors.policy.replica_weights import WeightsSource
    from sampo_ray.actors.weights.store import start_weight_store
    from sampo_ray.config.sections import GeneratorsConfig
    from sampo_ray.config.serving import ServeConfig
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.internals.transformers import saved_tensors
    from sampo_ray.run.version_files import write_version
    from sampo_ray.run.versions import VersionInfo, version_folder
    from sampo_ray.serve.endpoint import free_port, start_serve

    path, label = model_folder(model, folder)
    template = "llama3" if model is None else "tokenizer"
    chat = ChatFormat.load(path, template)
    chat.save(folder / "tokenizer")
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    base = version_folder(str(folder / "versions"), 0)
    write_version(base, saved_tensors(weights), path, VersionInfo(version=0, round=0, step=0))
    del weights
    ray.init(address="local", num_cpus=16, object_store_memory=3 << 30, include_dashboard=False, log_to_driver=False)
    try:
        serving = ServeConfig(port=free_port("127.0.0.1"), api_keys=())
        start_serve(serving)
        store = start_weight_store("bench", str(folder / "store.json"))
        ray.get(store.attach.remote(RUN, str(folder / "versions")), timeout=120)
        config = GeneratorsConfig(num_cpus=0.5, max_ongoing_requests=concurrency, engine=engine)
        app = policy_deployment("policy", base, str(folder / "tokenizer"), WeightsSource("bench"), config, CONTEXT)
        handle = serve.run(app, name="bench-policy", route_prefix=None)
        yield Rig(folder, path, label, store, handle, chat, serving)
        serve.shutdown()
        ray.kill(store)
    finally:
        ray.shutdown()
