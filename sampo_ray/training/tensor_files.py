"""Tensors in safetensors files, read by ranges: what is not read takes no memory, and no page of a file is mapped."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "BOOL": torch.bool},
}
"""torch's types of numbers by their names in the files (`model_files.PLAIN_TYPES`)."""


class StoredTensors(Protocol):
    """Tensors by the names of a checkpoint."""

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements [start, stop) of a tensor, flat; all of them without `stop`."""


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of safetensors files (`StoredTensors`). OSError if a file is shorter than its header says."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places = dict[str, _Place]()
        for file in files:
            with file.open("rb") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            for name, each in header.items():
                at = 8 + size + each["data_offsets"][0]
                self._places[name] = _Place(file, at, DTYPES[each["dtype"]], tuple(each["shape"]))

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (place.shape, place.dtype) for name, place in self._places.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        place = self._places[name]
        stop = torch.Size(place.shape).numel() if stop is None else stop
        tensor = torch.empty(stop - start, dtype=place.dtype)
        if stop > start:
            rest, at = memoryview(tensor.view(torch.uint8).numpy().data), place.offset + start * place.dtype.itemsize
            with place.file.open("rb", buffering=0) as opened:
                while rest:
                    if not (count := os.preadv(opened.fileno(), [rest], at)):
                        raise OSError(f"{place.file} ends within {name}")
                    rest, at = rest[count:], at + count
        return tensor


class TensorsInMemory:
    """Tensors that are here already (`StoredTensors`). What is read shares their memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]
