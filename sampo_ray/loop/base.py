"""Attaches a run to a weight store, and publishes the base model as its version 0."""

import tempfile
import time

import ray
import torch
from ray.actor import ActorHandle
from transformers import AutoModelForCausalLM

from sampo_ray.actors.weights.store import NewVersion, publish_version
from sampo_ray.data.chat import ChatFormat
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import lineage
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import VersionInfo

ATTACH_S = 120.0
PUBLISH_BASE_S = 3600.0


def attach_run(store: ActorHandle, run: Run) -> None:
    """Makes the store serve this run; a new run first gets its tokenizer with its template, and its version 0."""
    ray.get(store.attach.remote(run.id, run.versions.url), timeout=ATTACH_S)
    tokenizer = run.place.at("tokenizer")
    if not tokenizer.at("tokenizer_config.json").exists():
        with tokenizer.draft() as draft:
            ChatFormat.load(run.config.model.path, run.config.model.template).save(draft)
            tokenizer.take(draft)
    if not run.versions.at("000000", "version.json").exists():
        source = lineage(run.config, None)
        base = VersionInfo(version=0, round=0, step=0, created=int(time.time()), base=source.base, recipe=source.recipe)
        new = NewVersion(run.id, run.versions, base, reference=True)
        ray.get(_publish_base.remote(run.config.model.path, tokenizer, store, new), timeout=PUBLISH_BASE_S)


@ray.remote(num_cpus=0.5, max_retries=1)
def _publish_base(path: str, tokenizer: Place, store: ActorHandle, new: NewVersion) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_safetensors=True)
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    ends = model.generation_config.eos_token_id
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, chat.end_of_turn_id)]
    model.generation_config.eos_token_id = [chat.end_of_turn_id, *others]
    with tempfile.TemporaryDirectory(prefix="sampo-") as shell:
        model.config.save_pretrained(shell)
        model.generation_config.save_pretrained(shell)
        chat.save(shell)
        publish_version(store, new, model.named_parameters(), shell, PUBLISH_BASE_S)
