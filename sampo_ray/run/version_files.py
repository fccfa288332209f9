"""The files of versions: Hugging Face folders (bf16 safetensors), complete with their `version.json`.

What a LoRA run publishes within its rounds are folders in peft's format. Their version.json says, as `adapters`, which
version they belong to (`base`: the one that their round began with), the `rank` and the `scaling`. The store hands such
a version out as the base's buckets, which are in the object store anyway, and one more with the adapters, some
hundredths of their bytes. A replica merges them as the trainer would (`sampo_ray/training/lora.py`), before its engine
pauses.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import BUCKET_BYTES, Bucket, TensorSpec, checksum, checksums, flat, pack, views
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import AdaptersInfo, VersionInfo, is_complete, read_info
from sampo_ray.training.lora import MATRICES, file_name, peft_settings

SHELL_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def write_version(
    folder_url: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    info: VersionInfo,
    bucket_bytes: int = BUCKET_BYTES,
    keep: Callable[[Bucket], Bucket] = lambda bucket: bucket,
) -> list[Bucket]:
    """Writes a Hugging Face folder, one shard a bucket, and returns what `keep` made of each bucket.

    `folder_url` and `shell_folder` (config, generation config, tokenizer) are local paths or fsspec URLs; `info`
    goes into version.json, which appears last: with it the version is complete. A complete version is never
    rewritten: then `tensors` is only drained (its iteration may be a collective) and the buckets are those on disk.
    """
    if is_complete(folder_url):
        deque(tensors, maxlen=0)
        return [keep(bucket) for bucket in read_version(folder_url)]
    with _drafted(folder_url, info) as draft:
        shell = _copy_shell(shell_folder, draft)
        return _write_shards(draft, tensors, shell, bucket_bytes, keep)


@contextmanager
def _drafted(folder_url: str, info: VersionInfo) -> Iterator[Path]:
    """A folder for the files of a version that is not complete yet; afterwards they are in place, version.json last."""
    place = Place(folder_url.rstrip("/"))
    parent, _, name = place.url.rpartition("/")
    Place(parent).clear_drafts()
    with place.draft() as scratch:
        draft = scratch / name
        draft.mkdir()
        yield draft
        complete = info.model_copy(update={"files": checksums(draft)})
        content = json.dumps(complete.model_dump(exclude_unset=True), indent=1)
        place.remove()  # an attempt that did not finish
        if place.local:  # all at once, also for those who do not look at version.json
            (draft / "version.json").write_text(content)
            os.rename(draft, place.path)
        else:
            place.take(draft)
            place.at("version.json").write(content.encode())


def _copy_shell(shell_folder: str, draft: Path) -> dict[str, Any]:
    shell = Place(shell_folder)
    for name in shell.names():
        if name.endswith(SHELL_SUFFIXES) and not name.endswith(".index.json") and name != "version.json":
            (draft / name).write_bytes(shell.at(name).read())
    if not (draft / "config.json").exists():
        raise WeightsError(f"{shell_folder}: no config.json; name a Hugging Face model folder")
    config: dict[str, Any] = json.loads((draft / "config.json").read_text())
    return config


def _write_shards(
    draft: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell: dict[str, Any],
    bucket_bytes: int,
    keep: Callable[[Bucket], Bucket],
) -> list[Bucket]:
    kept, shards = list[Bucket](), list[tuple[TensorSpec, ...]]()
    for bucket in pack(tensors, bucket_bytes):
        path = draft / f"shard-{len(shards)}.safetensors"
        save_file(dict(views(bucket.specs, flat(bucket.data))), path, metadata={"format": "pt"})
        shards.append(bucket.specs)
        kept.append(keep(bucket))
    if not shards:
        raise WeightsError(f"{draft.name}: no tensors to write")
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (draft / f"shard-{number}.safetensors").rename(draft / file)
        weight_map |= {spec.name: file for spec in specs}
    total = sum(spec.nbytes for specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # Loaders take the data type from the config, which may still name that of the files the run started from: here
    # that of most bytes, as some models have parts in fp32.
    sizes = Counter[str]()
    for spec in (spec for specs in shards for spec in specs):
        sizes[spec.dtype] += spec.nbytes
    config = {key: value for key, value in shell.items() if key != "torch_dtype"} | {"dtype": sizes.most_common()[0][0]}
    (draft / "config.json").write_text(json.dumps(config, indent=2))
    return kept


def read_version(folder_url: str) -> Iterator[Bucket]:
    """Yields the version's shards as buckets, each file's checksum verified first (WeightsError if one fails)."""
    for name, expected in read_info(folder_url).files.items():
        try:
            data = Place(folder_url).at(name).read()
        except FileNotFoundError:
            raise WeightsError(f"{folder_url}/{name}: missing, though version.json names it") from None
        if (found := checksum(data)) != expected:
            raise WeightsError(f"{folder_url}/{name}: checksum is {found}, expected {expected}; the file is damaged")
        if name.endswith(".safetensors"):
            yield from pack(load(data).items(), 2 * len(data))


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
    """Writes a folder that peft loads, and returns what `keep` made of its tensors; see `write_version`. `weights` are
    names of adapted weights, each with A [rank, in] and B [out, rank]."""
    held, layers = dict[str, torch.Tensor](), []
    for name, parts in weights:
        layers.append(name.removesuffix(".weight"))
        held |= {file_name(name, side): part.to("cpu", copy=True) for side, part in zip(MATRICES, parts, strict=True)}
    if not is_complete(folder_url):
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **peft_settings(config, layers)}
        with _drafted(folder_url, info) as draft:
            save_file(held, draft / "adapter_model.safetensors", metadata={"format": "pt"})
            (draft / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    (bucket,) = read_version(folder_url)
    return keep(bucket)
