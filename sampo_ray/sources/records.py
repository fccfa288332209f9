"""Data sources, read as streams of records.

A source is a JSON Lines file (compressed or not), a JSON file with an array, a Parquet file, a glob or folder of such
files, a folder written by `datasets`' `save_to_disk`, or a dataset on the Hugging Face hub. A split of a dataset, or of
a folder that is laid out like a repository of the hub, is named after a colon, as in `org/name:train_prefs`. Files may
be at any fsspec URL.

JSON and Parquet files are read here, wherever they are, so that text stays the text of the file. `datasets` says which
files a split has, and reads what it has saved itself and other formats.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sampo_ray.errors import DataError
from sampo_ray.sources.files import as_data_error, json_rows, parquet_rows

_PARQUET = re.compile(r"\.(parquet|pq)$")
_FILE = re.compile(r"\.((jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?|parquet|pq)$")
_LINES_OR_TABLE = re.compile(r"\.((jsonl|ndjson)(\.(gz|bz2|xz|zst))?|parquet|pq)$")  # a .json may be anything
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|eval|dev)([^a-z]|$)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row. `position` is unique in its source and the same on every machine, `where` a 1-based `file:line`."""

    position: str
    where: str
    values: dict[str, object]


def read_records(source: str) -> Iterator[Record]:
    """Streams a source's rows in an order that depends on the source alone. Raises DataError."""
    with as_data_error(source):
        opened = _open(source)
    if isinstance(opened, _Dataset):
        yield from _dataset_records(source, opened)
        return
    for path in opened.paths:
        read = parquet_rows if _PARQUET.search(path) else json_rows
        for number, values in read(opened.fs, path):
            yield Record(f"{opened.name(path)}:{number}", f"{path}:{number}", values)


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of a source's content; for a hub dataset, of its name and commit."""
    digest = hashlib.sha256()
    with as_data_error(source):
        opened = _open(source)
        files = opened if isinstance(opened, _Files) else opened.files
        if files.hub is not None:
            from huggingface_hub import dataset_info

            digest.update(f"{source}\n{dataset_info(files.hub).sha}".encode())
            return digest.hexdigest()
        for path in files.paths:
            digest.update(f"{files.name(path)}\n{files.fs.size(path)}\n".encode())
            with files.fs.open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def is_here(source: str) -> bool:
    """Whether a source names something on this machine: a path, a pattern in a folder, or a folder with a split."""
    if has_magic(source):
        return Path(_before_magic(source) or ".").is_dir()
    folder, _, _ = source.rpartition(":")
    return Path(source).exists() or bool(folder and Path(folder).is_dir())


def _before_magic(pattern: str) -> str:
    """The folder that holds all that a pattern matches."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


@dataclass(frozen=True)
class _Files:
    """The files of a source; `hub` is the name of the hub's dataset that has them."""

    fs: AbstractFileSystem
    root: str
    paths: list[str]
    hub: str | None = None

    def name(self, path: str) -> str:
        """A file's path relative to the source, the same on every machine."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


@dataclass(frozen=True)
class _Dataset:
    """Files that `datasets` reads: `load` gives one dataset, or a dictionary of splits."""

    name: str
    split: str | None
    files: _Files
    load: Callable[[], object]


def _open(source: str) -> _Files | _Dataset:
    name, _, split = source.rpartition(":")
    if name and not split.startswith("//") and (saved := _saved_dataset(name, split)):
        return saved
    if saved := _saved_dataset(source, None):
        return saved
    fs, path = url_to_fs(source)
    if has_magic(source):
        return _Files(fs, _before_magic(path), _readable(source, sorted(fs.glob(path))))
    if _FILE.search(path):
        if fs.exists(path):
            return _Files(fs, path, [path])
    elif "://" in source or fs.exists(path):
        return _folder(source, fs, path)
    elif name and Path(name).is_dir():
        return _repository(name, split, hub=None)
    elif _HUB_NAME.fullmatch(source):
        name, _, split = source.partition(":")
        with as_data_error(f"{source} (no local file, so a hub dataset)"):
            return _repository(name, split or None, hub=name)
    raise DataError(f"data source {source!r}: no such file or folder; name a file, a folder, a URL or a hub dataset")


def _saved_dataset(folder: str, split: str | None) -> _Dataset | None:
    """A folder that `datasets` wrote with `save_to_disk`; None for any other source."""
    if has_magic(folder) or _FILE.search(folder):
        return None
    fs, path = url_to_fs(folder)
    if not any(fs.exists(f"{path}/{mark}") for mark in ("dataset_dict.json", "state.json")):
        return None

    def load() -> object:
        import datasets  # takes a second, which other sources do not need

        return datasets.load_from_disk(folder)

    return _Dataset(folder, split, _Files(fs, path, sorted(fs.find(path))), load)


def _repository(name: str, split: str | None, hub: str | None) -> _Files | _Dataset:
    """A dataset of the hub, or a folder that is laid out like one: `datasets` finds the files of its splits."""
    import datasets

    builder = datasets.load_dataset_builder(name)
    found = builder.config.data_files or {}
    by_split = {str(each): [str(url) for url in urls] for each, urls in found.items()}
    fs, root = url_to_fs(builder.base_path or name)
    whole = not getattr(builder.config, "field", None)  # not one field of a JSON file
    if by_split and whole and all(_FILE.search(url) for urls in by_split.values() for url in urls):
        urls = by_split[_chosen_split(name, split, by_split)]
        return _Files(fs, root, [url_to_fs(url)[1] for url in urls], hub)
    files = _Files(fs, root, [] if hub else sorted(fs.find(root)), hub)
    return _Dataset(name, split, files, builder.as_streaming_dataset)


def _chosen_split(name: str, split: str | None, splits: Collection[str]) -> str:
    """The split that is named, else `train`, else the only one. DataError if there is none of these."""
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        known = ", ".join(splits)
        raise DataError(
            f"data source {name!r}: has the splits {known}; name one, as in {name}:{next(iter(splits), 'train')}"
        )
    return chosen


def _folder(source: str, fs: AbstractFileSystem, path: str) -> _Files | _Dataset:
    if fs.isfile(path):
        return _Files(fs, path, _readable(source, [path]))
    if isinstance(fs, LocalFileSystem) and _declares_splits(Path(path) / "README.md"):
        return _repository(path, None, hub=None)
    every = sorted(fs.find(path))
    usual = [each for each in every if _LINES_OR_TABLE.search(each)]
    files = _Files(fs, path, usual or [each for each in every if _FILE.search(each)])
    if not files.paths:
        raise DataError(f"data source {source!r}: no .jsonl(.gz), .json or .parquet files in this folder; name another")
    held_out = [p for p in files.paths if _HELD_OUT.search(files.name(p).lower())]
    if held_out and len(held_out) < len(files.paths):
        raise DataError(
            f"data source {source!r}: holds training data beside held-out files ({files.name(held_out[0])}); "
            f"name the ones to read, as in {source.rstrip('/')}/train*"
        )
    return files


def _declares_splits(card: Path) -> bool:
    """Whether a dataset card says which files belong to which split."""
    return card.is_file() and bool(
        re.match(r"---\n(?:(?!---$).*\n)*?configs:", card.read_text(errors="replace"), re.MULTILINE)
    )


def _readable(source: str, paths: list[str]) -> list[str]:
    if not paths:
        raise DataError(f"data source {source!r}: no file matches; correct the pattern")
    for path in paths:
        if not _FILE.search(path):
            raise DataError(f"data source {path!r}: this format cannot be read; use .jsonl(.gz), .json or .parquet")
    return paths


def _dataset_records(source: str, dataset: _Dataset) -> Iterator[Record]:
    with as_data_error(source):
        loaded = dataset.load()
        split = ""
        if isinstance(loaded, dict):
            split = _chosen_split(dataset.name, dataset.split, [str(each) for each in loaded])
            loaded = loaded[split]
        elif dataset.split is not None:
            raise DataError(f"data source {source!r}: has no splits; drop :{dataset.split}")
        for number, values in enumerate(cast(Iterable[dict[str, object]], loaded), start=1):
            yield Record(f"{split or 'row'}:{number}", f"{source}:{number}", values)


@dataclass(frozen=True)
class Opened:
    """Stand-in."""

    name: str

    def records(self) -> Iterator[Record]:
        return read_records(self.name)

    def share_read(self) -> float | None:
        return None


def open_source(name: str) -> Opened:
    """Stand-in."""
    return Opened(name)
