"""The files of versions: Hugging Face folders (bf16 safetensors), complete with their `version.json`.

What a LoRA run publishes within its rounds are folders in peft's format. Their version.json says, as `adapters`, which
version they belong to (`base`: the one that their round began with), the `rank` and the `scaling`. The store hands such
a version out as the base's buckets, which are in the object store anyway, and one more with the adapters, some
hundredths of their bytes. A replica merges them as the trainer would (`sampo_ray/training/lora.py`), before its engine
pauses.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import BUCKET_BYTES, Bucket
from sampo_ray.run.checksums import checksum, checksums
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.storage import DRAFT, Place
from sampo_ray.run.tensor_files import specs_of, write_tensors
from sampo_ray.run.versions import AdaptersInfo, VersionInfo, is_complete, read_info
from sampo_ray.training.lora import peft_settings

ADAPTERS_FILE = "adapter_model.safetensors"
SHELL_SUFFIXES = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Draft:
    """A version that is being written, by several processes perhaps: its folder, and where its files are until then:
    on local disks next to it, on object storage in it, where they count for nothing before version.json is there."""

    folder: Place
    files: Place

    def discard(self) -> None:
        """Removes what was written of a version that could not be completed, which may be what fills a disk."""
        (Place(os.path.dirname(self.files.path)) if self.files.local else self.folder).remove()


@dataclass(frozen=True)
class WrittenFile:
    """A file of weights: its name and checksum, and the data type and bytes of each of its tensors."""

    name: str
    checksum: str
    tensors: dict[str, tuple[str, int]]


def begin_version(folder_url: str) -> Draft | None:
    """A draft for the version's files; None if it is complete, and never written again. Removes what attempts left that
    did not finish: one process at a time may write versions there."""
    if is_complete(folder_url):
        return None
    folder = Place(folder_url.rstrip("/"))
    parent = Place(folder.url.rpartition("/")[0])
    parent.clear_drafts()
    folder.remove()
    if not folder.local:
        return Draft(folder, folder)
    os.makedirs(parent.path, exist_ok=True)
    files = Place(tempfile.mkdtemp(prefix=DRAFT, dir=parent.path)).at(folder.name)
    os.mkdir(files.path)
    return Draft(folder, files)


def file_of_weights(index: int, count: int) -> str:
    """The name of a file of weights, from 0, of so many."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_weights(draft: Draft, name: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> WrittenFile:
    """Writes a file of the draft; any process may."""
    listed = dict(tensors)
    if draft.files.local:
        found = write_tensors(Path(draft.files.path) / name, listed)
    else:
        with draft.files.draft() as scratch:
            found = write_tensors(scratch / name, listed)
            draft.files.take_file(scratch / name)
    types = {key: (str(each.dtype).removeprefix("torch."), each.nbytes) for key, each in listed.items()}
    return WrittenFile(name, found, types)


def complete_version(draft: Draft, shell_folder: str, info: VersionInfo, files: Iterable[WrittenFile]) -> None:
    """Makes a whole model of the draft, with the files of weights that all have written. `shell_folder` has its config,
    generation config and tokenizer."""
    written = [file for file in files if file.tensors]
    if not written:
        raise WeightsError(f"{draft.folder.url}: no tensors to write")
    with scratch_folder() as folder:
        config = _copy_shell(shell_folder, folder)
        sizes, tensors = Counter[str](), [each for file in written for each in file.tensors.values()]
        for dtype, nbytes in tensors:
            sizes[dtype] += nbytes
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file.name for file in written for name in file.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        # Loaders take the data type from the config, which may still name that of the files the run started from: here
        # that of most bytes, as some models have parts in fp32.
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = sizes.most_common()[0][0]
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        _complete(draft, info, folder, written)


def _complete(draft: Draft, info: VersionInfo, others: Path, written: Iterable[WrittenFile]) -> None:
    """Adds the other files and, last, version.json with the checksums of all."""
    sums = {file.name: file.checksum for file in written} | checksums(others)
    complete = info.model_copy(update={"files": dict(sorted(sums.items()))})
    content = json.dumps(complete.model_dump(exclude_unset=True), indent=1).encode()
    draft.files.take(others)
    if draft.folder.local:  # all at once, also for those who do not look at version.json
        draft.files.at("version.json").write(content)
        os.rename(draft.files.path, draft.folder.path)
        os.rmdir(os.path.dirname(draft.files.path))
        return
    if draft.files != draft.folder:
        draft.folder.take(Path(draft.files.path))
    draft.folder.at("version.json").write(content)


@contextmanager
def _drafted(folder_url: str) -> Iterator[Draft | None]:
    """A draft whose files are on a local disk; None for a version that is complete."""
    draft = begin_version(folder_url)
    if draft is None or draft.files.local:
        try:
            yield draft
        finally:
            if draft is not None:
                draft.discard()
        return
    with scratch_folder() as folder:
        yield Draft(draft.folder, Place(str(folder)))


def write_version(
    folder_url: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    info: VersionInfo,
    file_bytes: int = BUCKET_BYTES,
) -> None:
    """Writes a Hugging Face folder from one process, which need not hold all tensors at once.

    `folder_url` and `shell_folder` (config, generation config, tokenizer) are local paths or fsspec URLs; `info`
    goes into version.json, which appears last: with it the version is complete. A complete version is never
    rewritten: then `tensors` is only drained (its iteration may be a collective).
    """
    with _drafted(folder_url) as draft:
        parts = _parts(tensors, file_bytes)
        if draft is None:
            for _ in parts:
                pass
            return
        written = [write_weights(draft, f"file-{number}", part) for number, part in enumerate(parts)]
        for number, file in enumerate(written):  # how many there are is known now
            written[number] = replace(file, name=file_of_weights(number, len(written)))
            os.rename(f"{draft.files.path}/{file.name}", f"{draft.files.path}/{written[number].name}")
        complete_version(draft, shell_folder, info, written)


def _parts(tensors: Iterable[tuple[str, torch.Tensor]], nbytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies of the tensors, each made before the next is asked for, in lists of at most `nbytes`, or of one that is
    larger."""
    part = list[tuple[str, torch.Tensor]]()
    for name, tensor in tensors:
        if part and sum(each.nbytes for _, each in part) + tensor.nbytes > nbytes:
            yield part
            part = []
        part.append((name, tensor.detach().to("cpu", copy=True)))
    if part:
        yield part


def _copy_shell(shell_folder: str, folder: Path) -> dict[str, Any]:
    shell = Place(shell_folder)
    for name in shell.names():
        if name.endswith(SHELL_SUFFIXES) and not name.endswith(".index.json") and name != "version.json":
            (folder / name).write_bytes(shell.at(name).read())
    if not (folder / "config.json").exists():
        raise WeightsError(f"{shell_folder}: no config.json; name a Hugging Face model folder")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def read_version(folder_url: str) -> Iterator[Bucket]:
    """Yields the version's files of weights as buckets, of the same bytes; each file's checksum is verified first
    (WeightsError if one fails). On local disks they are read as they are used."""
    for name, expected in read_info(folder_url).files.items():
        try:
            data = _bytes_of(Place(folder_url).at(name))
        except FileNotFoundError:
            raise WeightsError(f"{folder_url}/{name}: missing, though version.json names it") from None
        if (found := checksum(data)) != expected:
            raise WeightsError(f"{folder_url}/{name}: checksum is {found}, expected {expected}; the file is damaged")
        if name.endswith(".safetensors"):
            yield Bucket(specs_of(data), data, expected)


def _bytes_of(file: Place) -> np.ndarray:
    """Read-only uint8 [bytes] of the file, of a local one as they are used."""
    if file.local and os.path.getsize(file.path):
        return np.asarray(np.memmap(file.path, np.uint8, "r"))  # of its class, Ray would copy the bytes once more
    return np.frombuffer(file.read(), np.uint8)


def adapters_info(config: LoraConfig, base: int) -> AdaptersInfo:
    """The entry `adapters` of a version.json."""
    return AdaptersInfo(base=base, rank=config.rank, scaling=config.scaled_by / config.rank)


def complete_adapters(draft: Draft, config: LoraConfig, info: VersionInfo, written: WrittenFile) -> None:
    """Makes a folder that peft loads of the draft, with the one file of adapters, by peft's names."""
    one_of_each = [name.removesuffix(".lora_A.weight") for name in written.tensors if name.endswith(".lora_A.weight")]
    layers = [name.removeprefix("base_model.model.") for name in one_of_each]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **peft_settings(config, layers)}
    with scratch_folder() as folder:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))
        _complete(draft, info, folder, [written])


def write_adapters(
    folder_url: str, tensors: Iterable[tuple[str, torch.Tensor]], config: LoraConfig, info: VersionInfo
) -> None:
    """Writes a folder that peft loads, unless it is complete; `tensors` have the names of peft's files
    (`lora.file_name`)."""
    with _drafted(folder_url) as draft:
        if draft is not None:
            complete_adapters(draft, config, info, write_weights(draft, ADAPTERS_FILE, tensors))
