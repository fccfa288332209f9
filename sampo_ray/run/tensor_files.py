"""safetensors files as bytes: written from tensors without a copy, and read as they lie.

The format is public: eight bytes with the length of a header in JSON, the header, the tensors' bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from sampo_ray.run.buckets import ALIGNMENT, TensorSpec
from sampo_ray.run.checksums import checksum_of
from sampo_ray.training.host_copies import as_bytes

LENGTH = 8
TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
NAMES = {name: key for key, name in TYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes the tensors, on the CPU, and returns the file's checksum; durable on return."""
    with path.open("wb") as file:

        def written() -> Iterator[memoryview | bytes]:
            for piece in pieces(tensors):
                file.write(piece)
                yield piece

        found = checksum_of(written())
        file.flush()
        os.fsync(file.fileno())
    return found


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of the file: its header, and each tensor, those of larger elements first, so that all are aligned."""
    ordered = sorted(tensors.items(), key=lambda each: -each[1].element_size())
    header, end = {"__metadata__": {"format": "pt"}}, 0
    entries: dict[str, object] = dict(header)
    for name, tensor in ordered:
        key, begin, end = NAMES[str(tensor.dtype).removeprefix("torch.")], end, end + tensor.nbytes
        entries[name] = {"dtype": key, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(LENGTH + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(LENGTH, "little") + text
    for _, tensor in ordered:
        yield as_bytes(tensor).numpy().data


def specs_of(data: np.ndarray) -> tuple[TensorSpec, ...]:
    """Where the tensors lie in the bytes of a file."""
    start = LENGTH + int.from_bytes(data[:LENGTH].tobytes(), "little")
    entries = json.loads(data[LENGTH:start].tobytes())
    specs = [
        TensorSpec(name, TYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin)
        for name, entry in entries.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    ]
    return tuple(sorted(specs, key=lambda spec: spec.offset))
