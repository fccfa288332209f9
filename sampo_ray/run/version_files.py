"""Weights on their way from trainer to replicas: buckets of bytes, durable versions, and the store that hands them out.

A *version* is a Hugging Face folder `versions/<number>/` (bf16 safetensors), complete once its `version.json` exists;
a LoRA run's versions within a round are folders of peft's instead (`adapters.py`).
A *bucket* is one shard's tensors as a flat byte array with a checksum, in memory or in Ray's object store.
The *store* (`weight_store.py`) is an actor that replicas long-poll; it only ever hands out versions that are durable.
"""

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save_file

from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import BUCKET_BYTES, Bucket, TensorSpec, checksum, checksums, flat, pack, views
from sampo_ray.run.version_folders import VersionInfo, is_complete, read_info

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
    `lm_head.weight` is left out when the config ties it to the embeddings.
    """
    if is_complete(folder_url):
        deque(tensors, maxlen=0)
        return [keep(bucket) for bucket in read_version(folder_url)]
    with drafted(folder_url, info) as draft:
        shell = _copy_shell(shell_folder, draft)
        if shell.get("tie_word_embeddings"):
            tensors = ((key, tensor) for key, tensor in tensors if key != "lm_head.weight")
        return _write_shards(draft, tensors, shell, bucket_bytes, keep)


@contextmanager
def drafted(folder_url: str, info: VersionInfo) -> Iterator[Path]:
    """A folder for the files of a version that is not complete yet; afterwards they are in place, version.json last."""
    fs, folder = fsspec.core.url_to_fs(folder_url)
    parent, name = folder.rsplit("/", 1)
    local = isinstance(fs, LocalFileSystem)
    if local:
        os.makedirs(parent, exist_ok=True)
        for leftover in Path(parent).glob(f".{name}.*"):
            shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent if local else None) as scratch:
        draft = Path(scratch) / name
        draft.mkdir()
        yield draft
        complete = info.model_copy(update={"files": checksums(draft)})
        (draft / "version.json").write_text(json.dumps(complete.model_dump(exclude_unset=True), indent=1))
        _place(draft, fs, folder, local)


def _copy_shell(shell_folder: str, draft: Path) -> dict[str, Any]:
    fs, shell = fsspec.core.url_to_fs(shell_folder)
    for path in fs.ls(shell, detail=False):
        name = path.rsplit("/", 1)[-1]
        if name.endswith(SHELL_SUFFIXES) and not name.endswith(".index.json") and name != "version.json":
            (draft / name).write_bytes(fs.cat_file(path))
    if not (draft / "config.json").exists():
        raise WeightsError(f"{shell_folder}: no config.json; name a Hugging Face model folder")
    return json.loads((draft / "config.json").read_text())


def _write_shards(
    draft: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell: dict[str, Any],
    bucket_bytes: int,
    keep: Callable[[Bucket], Bucket],
) -> list[Bucket]:
    kept: list[Bucket] = []
    shards: list[tuple[TensorSpec, ...]] = []
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
    # Loaders take the data type from the config, which may still name that of the files the run started from.
    config = {key: value for key, value in shell.items() if key != "torch_dtype"} | {"dtype": shards[0][0].dtype}
    (draft / "config.json").write_text(json.dumps(config, indent=2))
    return kept


def _place(draft: Path, fs: Any, folder: str, local: bool) -> None:
    if fs.exists(folder):
        fs.rm(folder, recursive=True)  # an attempt that did not finish
    if local:
        os.rename(draft, folder)
        return
    for path in sorted(draft.iterdir(), key=lambda path: path.name == "version.json"):
        fs.put_file(str(path), f"{folder}/{path.name}")


def read_version(folder_url: str) -> Iterator[Bucket]:
    """Yields the version's shards as buckets, each file's checksum verified first (WeightsError if one fails)."""
    fs, folder = fsspec.core.url_to_fs(folder_url)
    for name, expected in read_info(folder_url).files.items():
        try:
            data = fs.cat_file(f"{folder}/{name}")
        except FileNotFoundError:
            raise WeightsError(f"{folder_url}/{name}: missing, though version.json names it") from None
        found = checksum(data)
        if found != expected:
            raise WeightsError(f"{folder_url}/{name}: checksum is {found}, expected {expected}; the file is damaged")
        if name.endswith(".safetensors"):
            yield from pack(load(data).items(), 2 * len(data))
