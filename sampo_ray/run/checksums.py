"""Checksums of bytes and files: against damage, not against malice."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

PIECE_BYTES = 16 << 20


def checksum(data: Any) -> str:
    """Checksum of a bytes-like object."""
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
    return named(state)


def named(state: xxhash.xxh3_128) -> str:
    """What was hashed, with the name of the hash."""
    return f"xxh3-128:{state.hexdigest()}"
