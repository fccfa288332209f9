"""Buckets: tensors as flat bytes with a checksum."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sampo_ray.errors import WeightsError
from sampo_ray.run.checksums import checksum as checksum
from sampo_ray.run.checksums import checksum_of as checksum_of
from sampo_ray.run.checksums import checksum_of_file as checksum_of_file
from sampo_ray.run.checksums import checksums as checksums
from sampo_ray.training.host_copies import as_bytes

BUCKET_BYTES = 64 << 20
ALIGNMENT = 64


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


def pack(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Copies (name, tensor) pairs into buckets of at most `bucket_bytes` (a larger tensor gets its own), each before
    the next is asked for, so that a source may free or reuse it (as a ZeRO-3 gather does)."""
    specs: list[TensorSpec] = []
    data, end = np.zeros(0, np.uint8), 0
    for name, tensor in tensors:
        source = as_bytes(tensor.to("cpu")).numpy()
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if specs and start + source.size > bucket_bytes:
            yield Bucket(tuple(specs), data[:end], checksum(data[:end]))
            specs, start = [], 0
        if not specs:
            data = np.zeros(max(bucket_bytes, source.size), np.uint8)
        end = start + source.size
        data[start:end] = source
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), start, source.size))
    if specs:
        yield Bucket(tuple(specs), data[:end], checksum(data[:end]))


def verify(bucket: Bucket, pieces: Iterable[np.ndarray] | None = None) -> None:
    """Raises WeightsError unless the bucket's bytes are here and match their checksum. `pieces`: the bytes, in turn."""
    of = f"bucket of {bucket.specs[0].name}"
    if not isinstance(bucket.data, np.ndarray):
        raise WeightsError(f"{of}: its bytes were not fetched (data is {type(bucket.data)})")
    if (found := checksum_of([bucket.data] if pieces is None else pieces)) != bucket.checksum:
        raise WeightsError(f"{of}: checksum is {found}, expected {bucket.checksum}; the bytes are damaged")


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
    places, specs, end = list[tuple[int, int]](), list[TensorSpec](), 0
    for bucket in buckets:
        start, size = -(-end // ALIGNMENT) * ALIGNMENT, max(spec.offset + spec.nbytes for spec in bucket.specs)
        places.append((start, size))
        specs += [replace(spec, offset=start + spec.offset) for spec in bucket.specs]
        end = start + size
    return places, specs
