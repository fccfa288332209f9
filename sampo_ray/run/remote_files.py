"""Files between object storage and this machine: several at once, large ones in pieces, tried again, sizes checked."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_exponential

PIECE_BYTES = 32 << 20
READERS, WRITERS = 8, 4
"""Pieces of files that are read at once, and files that are written: a large one is written in ten parts at once."""
FINAL = FileNotFoundError, PermissionError, FileExistsError


def attempts() -> Retrying:
    """For one request, besides what the storage library tries again by itself; not for errors that will stay."""
    return Retrying(
        retry=retry_if_not_exception_type((*FINAL, KeyboardInterrupt)),
        stop=stop_after_attempt(4),
        wait=wait_exponential(0.5, max=8.0),
        reraise=True,
    )


def download(fs: fsspec.AbstractFileSystem, folder: str, target: Path, names: Collection[str] | None = None) -> None:
    """Puts the files of a folder, or those of these names, into the local folder `target`, by their paths in it.
    FileNotFoundError where there is no such folder, or a name is missing."""
    sizes = {path.removeprefix(folder).lstrip("/"): info["size"] for path, info in fs.find(folder, detail=True).items()}
    if not sizes or (missing := set(names or ()) - sizes.keys()):
        raise FileNotFoundError(f"{folder}: {', '.join(sorted(missing)) if sizes else 'nothing'} is there")
    wanted = {name: size for name, size in sizes.items() if names is None or name in names}
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).touch()
    pieces = [(name, at, min(at + PIECE_BYTES, size)) for name, size in wanted.items() for at in _starts(size)]

    def fetch(name: str, start: int, end: int) -> None:
        for attempt in attempts():
            with attempt:
                data = fs.cat_file(f"{folder}/{name}", start=start, end=end)
                if len(data) != end - start:
                    raise OSError(f"{folder}/{name}: {len(data)} of the bytes {start} to {end} arrived")
        with (target / name).open("r+b") as file:
            os.pwrite(file.fileno(), data, start)

    _in_threads(READERS, fetch, pieces)


def _starts(size: int) -> range:
    return range(0, size, PIECE_BYTES)


def upload(fs: fsspec.AbstractFileSystem, files: Iterable[tuple[Path, str]]) -> None:
    """Writes local files to paths of a file system, whole or not at all, and removes them here."""

    def send(file: Path, path: str) -> None:
        for attempt in attempts():
            with attempt:
                fs.put_file(str(file), path)
                if (found := fs.info(path)["size"]) != (size := file.stat().st_size):
                    raise OSError(f"{path}: {found} of {size} bytes arrived")
        file.unlink()

    _in_threads(WRITERS, send, list(files))


def _in_threads(threads: int, work: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    """Does the work for all items; after an error, which it raises, only what has begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        for done in [pool.submit(work, *item) for item in items]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
