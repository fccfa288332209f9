"""Data sources, read as streams of records.

A source is a JSONL file (compressed or not), a Parquet file, a glob or folder of such files, a folder written by
`datasets`' `save_to_disk`, or the name of a dataset on the Hugging Face hub. For the last two, a split is named after a
colon, as in `org/name:train_prefs`. Files may be at any fsspec URL.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs

from sampo_ray.errors import DataError

_PARQUET = re.compile(r"\.(parquet|pq)$")
_FILE = re.compile(r"\.((jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?|parquet|pq)$")
_FILE_IN_FOLDER = re.compile(r"\.((jsonl|ndjson)(\.(gz|bz2|xz|zst))?|parquet|pq)$")  # a .json may be anything
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|eval|dev)([^a-z]|$)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_CHUNK = 1 << 20
_PARQUET_ROWS = 256  # rows in memory at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row.

    `position` is unique within its source and the same on every machine. `where` is for messages: `file:line`, 1-based.
    """

    position: str
    where: str
    values: dict[str, object]


def read_records(source: str) -> Iterator[Record]:
    """Streams a source's rows in an order that depends on the source alone. Raises DataError."""
    with _as_data_error(source):
        opened = _open(source)
    if isinstance(opened, _Dataset):
        yield from _dataset_records(source, opened)
        return
    for path in opened.paths:
        read = _parquet_rows if _PARQUET.search(path) else _json_rows
        for number, values in read(opened.fs, path):
            yield Record(f"{opened.name(path)}:{number}", f"{path}:{number}", values)


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of a source's content; for a hub dataset, of its name and commit."""
    digest = hashlib.sha256()
    with _as_data_error(source):
        opened = _open(source)
        if isinstance(opened, _Dataset) and opened.files is None:
            from huggingface_hub import dataset_info

            digest.update(f"{source}\n{dataset_info(opened.name).sha}".encode())
            return digest.hexdigest()
        files = opened if isinstance(opened, _Files) else opened.files
        assert files is not None
        for path in files.paths:
            digest.update(f"{files.name(path)}\n{files.fs.size(path)}\n".encode())
            with files.fs.open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Files:
    fs: AbstractFileSystem
    root: str
    paths: list[str]

    def name(self, path: str) -> str:
        """A file's path relative to the source, the same on every machine."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


@dataclass(frozen=True)
class _Dataset:
    name: str
    split: str | None
    files: _Files | None  # None: it is on the hub


def _open(source: str) -> _Files | _Dataset:
    folder, _, split = source.rpartition(":")
    if folder and not split.startswith("//") and (saved := _saved_dataset(folder)):
        return _Dataset(folder, split, saved)
    if saved := _saved_dataset(source):
        return _Dataset(source, None, saved)
    fs, path = url_to_fs(source)
    if has_magic(source):
        return _Files(
            fs, re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0], _readable(source, sorted(fs.glob(path)))
        )
    if _FILE.search(path):
        if fs.exists(path):
            return _Files(fs, path, [path])
    elif "://" in source or fs.exists(path):
        return _folder(source, fs, path)
    elif _HUB_NAME.fullmatch(source):
        name, _, split = source.partition(":")
        return _Dataset(name, split or None, None)
    raise DataError(f"data source {source!r}: no such file or folder; name a file, a folder, a URL or a hub dataset")


def _saved_dataset(source: str) -> _Files | None:
    """The files of a folder that `datasets` wrote; None for any other source."""
    if has_magic(source) or _FILE.search(source):
        return None
    fs, path = url_to_fs(source)
    if any(fs.exists(f"{path}/{mark}") for mark in ("dataset_dict.json", "state.json")):
        return _Files(fs, path, sorted(fs.find(path)))
    return None


def _folder(source: str, fs: AbstractFileSystem, path: str) -> _Files:
    if fs.isfile(path):
        return _Files(fs, path, _readable(source, [path]))
    files = _Files(fs, path, [p for p in sorted(fs.find(path)) if _FILE_IN_FOLDER.search(p)])
    if not files.paths:
        raise DataError(f"data source {source!r}: no .jsonl(.gz) or .parquet files in this folder; name another one")
    held_out = [p for p in files.paths if _HELD_OUT.search(files.name(p).lower())]
    if held_out and len(held_out) < len(files.paths):
        raise DataError(
            f"data source {source!r}: holds training data beside held-out files ({files.name(held_out[0])}); "
            f"name the ones to read, as in {source.rstrip('/')}/train*"
        )
    return files


def _readable(source: str, paths: list[str]) -> list[str]:
    if not paths:
        raise DataError(f"data source {source!r}: no file matches; correct the pattern")
    for path in paths:
        if not _FILE.search(path):
            raise DataError(f"data source {path!r}: this format cannot be read; use .jsonl(.gz) or .parquet")
    return paths


def _json_rows(fs: AbstractFileSystem, path: str) -> Iterator[tuple[int, dict[str, object]]]:
    with _as_data_error(path), fs.open(path, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); write one JSON object a line") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}:{number}: holds a {type(values).__name__}; write one JSON object a line")
            yield number, values


def _parquet_rows(fs: AbstractFileSystem, path: str) -> Iterator[tuple[int, dict[str, object]]]:
    number = 0
    with _as_data_error(path), fs.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield number, values


def _dataset_records(source: str, dataset: _Dataset) -> Iterator[Record]:
    # Imported here: it takes a second, which plain files do not need.
    import datasets

    if dataset.files is not None:
        with _as_data_error(source):
            loaded = datasets.load_from_disk(dataset.name)
    else:
        with _as_data_error(f"{source} (no local file, so a hub dataset)"):
            loaded = datasets.load_dataset(dataset.name, streaming=True)
    split = ""
    if isinstance(loaded, dict):
        split = dataset.split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "")
        if split not in loaded:
            raise DataError(
                f"data source {source!r}: has the splits {', '.join(map(str, loaded))}; "
                f"name one, as in {dataset.name}:{next(iter(loaded))}"
            )
        loaded = loaded[split]
    elif dataset.split is not None:
        raise DataError(f"data source {source!r}: has no splits; drop :{dataset.split}")
    with _as_data_error(source):
        for number, values in enumerate(loaded, start=1):
            yield Record(f"{split or 'row'}:{number}", f"{source}:{number}", values)


@contextlib.contextmanager
def _as_data_error(where: str) -> Iterator[None]:
    """Raises DataError for whatever file systems, decompressors and readers raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each file system has its own library's errors, which share no other base
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise DataError(f"data source {where!r}: cannot be read ({reason}); check that it is complete") from error
