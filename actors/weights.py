"""Weights on their way from trainer to replicas: buckets of bytes, durable versions, and the store that hands them out.

A *version* is a Hugging Face folder `versions/<number>/` (bf16 safetensors), complete once its `version.json` exists;
a LoRA run's versions within a round are folders of peft's instead (`adapters.py`).
A *bucket* is one shard's tensors as a flat byte array with a checksum, in memory or in Ray's object store.
The *store* (`weight_store.py`) is an actor that replicas long-poll; it only ever hands out versions that are durable.
"""

import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import ray
import torch
import xxhash
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save_file

BUCKET_BYTES = 64 << 20
PIECE_BYTES = 16 << 20
ALIGNMENT = 64
SHELL_SUFFIXES = (".json", ".jinja", ".txt", ".model")


class WeightsError(RuntimeError):
    """Weights that are incomplete, damaged, or not what was asked for."""


class Elsewhere(WeightsError):
    """A replica that holds other weights than those a call asks for, and will not hold them soon; ask another one."""


@dataclass(frozen=True)
class WeightsId:
    """Which weights: the run they belong to and their version number in it."""

    run: str
    version: int

    def __str__(self) -> str:
        return f"{self.run}@{self.version}"


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies in its bucket: `dtype` by torch's name, `offset` and `nbytes` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """Tensors as bytes. `data` is uint8 [bytes], or a reference to it in the object store."""

    specs: tuple[TensorSpec, ...]
    data: Any
    checksum: str


@dataclass(frozen=True)
class Weights:
    """A version as the store hands it out: `about` is its version.json, the buckets' data are object references."""

    id: WeightsId
    about: dict[str, Any]
    buckets: tuple[Bucket, ...]
    sequence: int = 0
    """How many times what its channel hands out had changed before; orders answers even across a rollback."""
    adapters: Bucket | None = None
    """LoRA adapters that are yet to be merged into the buckets (`adapters.py`), which are those of another version."""


def checksum(data: Any) -> str:
    """Checksum of a bytes-like object; against damage, not against malice."""
    return checksum_of([data])


def checksum_of_file(path: Path) -> str:
    """The checksum of a file's bytes, of which a few are in memory at a time."""
    with path.open("rb") as file:
        return checksum_of(iter(lambda: file.read(PIECE_BYTES), b""))


def checksums(folder: Path) -> dict[str, str]:
    """Of the files in a folder, by name."""
    return {path.name: checksum_of_file(path) for path in sorted(folder.iterdir())}


def checksum_of(pieces: Iterable[Any]) -> str:
    """The checksum of all pieces, one after the other."""
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return f"xxh3-128:{state.hexdigest()}"


def pack(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Copies (name, tensor) pairs into buckets of at most `bucket_bytes` (a larger tensor gets its own), streaming.

    Each tensor is copied before the next is asked for, so a source may free or reuse it (as a ZeRO-3 gather does).
    """
    specs: list[TensorSpec] = []
    data, end = np.zeros(0, np.uint8), 0
    for name, tensor in tensors:
        source = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if specs and start + source.size > bucket_bytes:
            yield _sealed(specs, data[:end])
            specs, start = [], 0
        if not specs:
            data = np.zeros(max(bucket_bytes, source.size), np.uint8)
        end = start + source.size
        data[start:end] = source
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), start, source.size))
    if specs:
        yield _sealed(specs, data[:end])


def _sealed(specs: list[TensorSpec], data: np.ndarray) -> Bucket:
    return Bucket(tuple(specs), data, checksum(data))


def verify(bucket: Bucket, pieces: Iterable[np.ndarray] | None = None) -> None:
    """Raises WeightsError unless the bucket's bytes are here and match their checksum. `pieces`: the bytes, in turn."""
    if not isinstance(bucket.data, np.ndarray):
        raise WeightsError(
            f"bucket of {bucket.specs[0].name}: its bytes were not fetched (data is {type(bucket.data)})"
        )
    found = checksum_of([bucket.data] if pieces is None else pieces)
    if found != bucket.checksum:
        raise WeightsError(
            f"bucket of {bucket.specs[0].name}: checksum is {found}, expected {bucket.checksum}; the bytes are damaged"
        )


def unpack(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) as views of the bucket's bytes, not to be written to. Verifies the checksum first."""
    verify(bucket)
    return views(bucket.specs, flat(bucket.data))


def flat(data: np.ndarray) -> torch.Tensor:
    """The same bytes as a tensor, not to be written to where the array is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data)


def views(specs: Iterable[TensorSpec], data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) as views of uint8 [bytes], on any device, that were verified before."""
    for spec in specs:
        tensor = data[spec.offset : spec.offset + spec.nbytes].view(getattr(torch, spec.dtype))
        yield spec.name, tensor.reshape(spec.shape)


def joined(buckets: Iterable[Bucket]) -> tuple[list[tuple[int, int]], list[TensorSpec]]:
    """Where buckets lie when all are put into one range of bytes: start and size of each, and all tensors' specs."""
    places: list[tuple[int, int]] = []
    specs: list[TensorSpec] = []
    end = 0
    for bucket in buckets:
        start, size = -(-end // ALIGNMENT) * ALIGNMENT, max(spec.offset + spec.nbytes for spec in bucket.specs)
        places.append((start, size))
        specs += [replace(spec, offset=start + spec.offset) for spec in bucket.specs]
        end = start + size
    return places, specs


def version_folder(versions_url: str, version: int) -> str:
    return f"{versions_url.rstrip('/')}/{version:06d}"


def write_version(
    folder_url: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    about: dict[str, Any],
    bucket_bytes: int = BUCKET_BYTES,
    keep: Callable[[Bucket], Bucket] = lambda bucket: bucket,
) -> list[Bucket]:
    """Writes a Hugging Face folder, one shard a bucket, and returns what `keep` made of each bucket.

    `folder_url` and `shell_folder` (config, generation config, tokenizer) are local paths or fsspec URLs; `about` holds
    at least version, round and step and goes into version.json, which appears last: with it the version is complete. A
    complete version is never rewritten: then `tensors` is only drained (its iteration may be a collective) and the
    buckets are those on disk. `lm_head.weight` is left out when the config ties it to the embeddings.
    """
    if is_complete(folder_url):
        deque(tensors, maxlen=0)
        return [keep(bucket) for bucket in read_version(folder_url)]
    with drafted(folder_url, about) as draft:
        shell = _copy_shell(shell_folder, draft)
        if shell.get("tie_word_embeddings"):
            tensors = ((key, tensor) for key, tensor in tensors if key != "lm_head.weight")
        return _write_shards(draft, tensors, shell, bucket_bytes, keep)


@contextmanager
def drafted(folder_url: str, about: dict[str, Any]) -> Iterator[Path]:
    """A folder for the files of a version that is not complete yet; afterwards they are in place, version.json last."""
    missing = {"version", "round", "step"} - about.keys()
    if missing:
        raise WeightsError(f"about lacks {', '.join(sorted(missing))}; version.json must say which weights these are")
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
        files = checksums(draft)
        (draft / "version.json").write_text(json.dumps({**about, "files": files}, indent=1))
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


def is_complete(folder_url: str) -> bool:
    fs, folder = fsspec.core.url_to_fs(folder_url)
    return bool(fs.exists(f"{folder}/version.json"))


def read_about(folder_url: str) -> dict[str, Any]:
    """The version.json of a complete version; WeightsError when there is none."""
    fs, folder = fsspec.core.url_to_fs(folder_url)
    try:
        return json.loads(fs.cat_file(f"{folder}/version.json"))
    except FileNotFoundError:
        raise WeightsError(f"{folder_url}: not a complete version (no version.json)") from None


def read_version(folder_url: str) -> Iterator[Bucket]:
    """Yields the version's shards as buckets, each file's checksum verified first (WeightsError if one fails)."""
    fs, folder = fsspec.core.url_to_fs(folder_url)
    for name, expected in read_about(folder_url)["files"].items():
        try:
            data = fs.cat_file(f"{folder}/{name}")
        except FileNotFoundError:
            raise WeightsError(f"{folder_url}/{name}: missing, though version.json names it") from None
        found = checksum(data)
        if found != expected:
            raise WeightsError(f"{folder_url}/{name}: checksum is {found}, expected {expected}; the file is damaged")
        if name.endswith(".safetensors"):
            yield from pack(load(data).items(), 2 * len(data))


def complete_versions(versions_url: str) -> list[int]:
    """The numbers of all complete versions under `versions_url`, ascending."""
    fs, folder = fsspec.core.url_to_fs(versions_url)
    if not fs.exists(folder):
        return []
    fs.invalidate_cache()
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    numbers = sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))
    return [number for number in numbers if fs.exists(f"{version_folder(folder, number)}/version.json")]


def put(bucket: Bucket) -> Bucket:
    return replace(bucket, data=ray.put(bucket.data))


def rest(since: float, share: float) -> None:
    """Sleeps for as long as makes the work done since then (time.perf_counter) `share` of the time.

    An engine that computes on the same cores waits in each step for the slowest of its threads.
    """
    time.sleep((1 / share - 1) * (time.perf_counter() - since))


def fetch(bucket: Bucket, timeout_s: float) -> Bucket:
    """The bucket with its bytes in this process (a read-only view of the object store), verified."""
    here = replace(bucket, data=ray.get(bucket.data, timeout=timeout_s))
    verify(here)
    return here
