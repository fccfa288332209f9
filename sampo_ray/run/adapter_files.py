"""Adapters as a version: what a LoRA run publishes within its rounds, and how a replica makes weights of it.

Such a version is a folder in peft's format. Its version.json says, as `adapters`, which version it belongs to (`base`:
the one that its round began with), the `rank` and the `scaling`. The store hands it out as the base's buckets, which
are in the object store anyway, and one more with the adapters, some hundredths of their bytes. A replica merges them as
the trainer would (`sampo_ray/training/lora.py`), before its engine pauses.
"""

import json
from collections.abc import Callable, Iterable, Sequence

import torch
from safetensors.torch import save_file

from sampo_ray.config.sections import LoraConfig
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.version_files import drafted, read_version
from sampo_ray.run.version_folders import AdaptersInfo, VersionInfo, is_complete
from sampo_ray.training.lora import MATRICES, file_name, peft_settings


def adapters_info(config: LoraConfig, base: int) -> AdaptersInfo:
    """The entry `adapters` of a version.json."""
    return AdaptersInfo(base=base, rank=config.rank, scaling=config.scaled_by / config.rank)


def write_adapters(
    folder_url: str,
    weights: Iterable[tuple[str, Sequence[torch.Tensor]]],
    config: LoraConfig,
    info: VersionInfo,
    keep: Callable[[Bucket], Bucket] = lambda bucket: bucket,
) -> Bucket:
    """Writes a folder that peft loads, and returns what `keep` made of its tensors; see `write_version`.

    `weights` are names of adapted weights, each with A [rank, in] and B [out, rank].
    """
    held: dict[str, torch.Tensor] = {}
    layers = []
    for name, parts in weights:
        layers.append(name.removesuffix(".weight"))
        held |= {file_name(name, side): part.to("cpu", copy=True) for side, part in zip(MATRICES, parts, strict=True)}
    if not is_complete(folder_url):
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **peft_settings(config, layers)}
        with drafted(folder_url, info) as draft:
            save_file(held, draft / "adapter_model.safetensors", metadata={"format": "pt"})
            (draft / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    (bucket,) = read_version(folder_url)
    return keep(bucket)
