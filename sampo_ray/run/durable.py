"""Files that are on disk once they are written, with a checksum made on the way, so that nothing is read again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch.utils.serialization import config as torch_files

from sampo_ray.run.checksums import PIECE_BYTES, named


class HashedFile:
    """A file that is being written, and the checksum of what was written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._state = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        """Writes a bytes-like object of any size, each piece hashed while it is in the processor's cache."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._file.write(piece)
            self._state.update(piece)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def checksum(self) -> str:
        """As `checksums.checksum` makes it."""
        return named(self._state)


@contextmanager
def durable(path: Path) -> Iterator[HashedFile]:
    """A new file to write; what was written is on disk on leaving. One that could not be written is removed."""
    try:
        with path.open("wb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def save(state: object, path: Path) -> str:
    """Writes a file with torch.save and returns its checksum. The CRC of each tensor, which torch adds in several times
    the time of all else and never reads, is left out."""
    without_crcs = torch_files.patch({"save.compute_crc32": False})  # type: ignore[attr-defined]
    with durable(path) as file, without_crcs:
        torch.save(state, file)  # type: ignore[arg-type]  # it needs write and flush alone
    return file.checksum
