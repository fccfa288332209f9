"""What the name of a source names: files, a folder of them, a repository with configurations and splits."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sampo_ray.errors import DataError
from sampo_ray.sources.files import ANY_JSON, FILE, as_data_error, unreadable
from sampo_ray.sources.folders import data_files, files_of_split, likely, one_kind, only_split

_PART = re.compile(r"[^/\\:]+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Files:
    """The files of a source, in the order they are read; `field`: the key under which a JSON file has its rows."""

    fs: AbstractFileSystem
    root: str
    paths: list[str]
    field: str | None = None

    def name(self, path: str) -> str:
        """A file's path relative to the source, the same on every machine."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


@dataclass(frozen=True)
class Dataset:
    """Files that `datasets` reads: `load` gives one dataset, or a dictionary of splits."""

    name: str
    split: str | None
    load: Callable[[], object]


def find(source: str) -> Files | Dataset:
    """What a source names. Raises DataError for nothing, and where more than one thing may be meant."""
    if has_magic(source):
        return _pattern(source)
    for name, parts in _readings(source):
        fs, path = url_to_fs(name)
        path = path.rstrip("/") or path
        if fs.isdir(path):
            return _folder(name, fs, path, parts)
        if fs.exists(path):
            return _file(name, fs, path, parts)
    name, *picked = source.split(":")
    if "://" not in source and not FILE.search(name) and _HUB_NAME.fullmatch(name) and len(picked) <= 2:
        with as_data_error(f"{source} (no local file, so a hub dataset)"):
            return _repository(name, tuple(picked))
    raise DataError(f"data source {source!r}: no such file or folder; name a file, a folder, a URL or a hub dataset")


def chosen_split(name: str, split: str | None, splits: Collection[str]) -> str:
    """The split that is named, else `train`, else the only one. DataError if there is none of these."""
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        raise _ask(name, "splits", splits)
    return chosen


def _readings(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A source as a name that may have colons itself, with up to two parts behind it."""
    name, parts = source, tuple[str, ...]()
    yield name, parts
    for _ in range(2):
        name, _, part = name.rpartition(":")
        if not name or not _PART.fullmatch(part):
            return
        parts = (part, *parts)
        yield name, parts


def _pattern(source: str) -> Files:
    fs, path = url_to_fs(source)
    paths = sorted(each for each in fs.glob(path) if fs.isfile(each))
    if not paths:
        raise DataError(f"data source {source!r}: no file matches; correct the pattern")
    if wrong := next((each for each in paths if not FILE.search(each)), None):
        raise unreadable(wrong)
    return Files(fs, re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0], paths)


def _file(name: str, fs: AbstractFileSystem, path: str, parts: tuple[str, ...]) -> Files:
    if not FILE.search(path.partition("?")[0]):
        raise unreadable(path)
    if parts and not (len(parts) == 1 and ANY_JSON.search(path)):
        raise DataError(f"data source {name!r}: is a file, which has no splits; drop :{':'.join(parts)}")
    return Files(fs, path, [path], parts[0] if parts else None)


def _folder(name: str, fs: AbstractFileSystem, path: str, parts: tuple[str, ...]) -> Files | Dataset:
    if any(fs.exists(f"{path}/{mark}") for mark in ("dataset_dict.json", "state.json")):
        return _saved(name, parts)
    if isinstance(fs, LocalFileSystem) and _declares_configurations(Path(path) / "README.md"):
        return _repository(path, parts)
    if parts and fs.isdir(f"{path}/{parts[0]}"):
        known = files_of_split(name, fs, path, parts[0]) if len(parts) == 1 else None
        if known is None:
            return _folder(f"{name.rstrip('/')}/{parts[0]}", fs, f"{path}/{parts[0]}", parts[1:])
    if not data_files(fs, path):
        raise DataError(
            f"data source {name!r}: no .jsonl, .json, .csv, .tsv (.gz, .zst), .parquet or .arrow files in this folder; "
            "name another"
        )
    split = parts[-1] if parts and (len(parts) == 1 or parts[0] == "default") else None
    if parts and split is None:
        raise DataError(f"data source {name!r}: has no configuration {parts[0]!r}; drop it, or name a folder in it")
    found = files_of_split(name, fs, path, split) if split else only_split(name, fs, path)
    if found is None:
        raise DataError(f"data source {name!r}: has no split {split!r}, nor files that begin with it; name what it has")
    return Files(fs, path, one_kind(name, fs, path, found))


def _saved(name: str, parts: tuple[str, ...]) -> Dataset:
    """A folder that `datasets` wrote with `save_to_disk`."""

    def load() -> object:
        import datasets  # takes a second, which other sources do not need

        return datasets.load_from_disk(name)

    if len(parts) > 1:
        raise DataError(f"data source {name!r}: was saved without configurations; write {name}:{parts[-1]}")
    return Dataset(name, parts[0] if parts else None, load)


def _repository(name: str, parts: tuple[str, ...]) -> Files | Dataset:
    """A dataset of the hub, or a folder whose card names its configurations: `datasets` finds their files."""
    import datasets

    configuration, split = _chosen_parts(name, parts, datasets.get_dataset_config_names(name))
    builder = datasets.load_dataset_builder(name, configuration)
    found = builder.config.data_files or {}
    by_split = {str(each): [str(url) for url in urls] for each, urls in found.items()}
    named = f"{name}:{configuration}" if configuration else name
    if by_split and not _has_options(builder.config) and all(FILE.search(url) for u in by_split.values() for url in u):
        urls = by_split[chosen_split(named, split, by_split)]
        fs, root = url_to_fs(builder.base_path or name)
        return Files(fs, root, [url_to_fs(url)[1] for url in urls], getattr(builder.config, "field", None))
    return Dataset(named, split, builder.as_streaming_dataset)


def _chosen_parts(name: str, parts: tuple[str, ...], known: list[str]) -> tuple[str | None, str | None]:
    """The configuration (None: the only one) and the split that are named."""
    if len(known) <= 1:
        if len(parts) > 1 and parts[0] not in (*known, "default"):
            raise _ask(name, "configurations", known)
        split = parts[-1] if parts and not (len(parts) == 1 and parts[0] in known) else None
        return None, split
    if not parts or parts[0] not in known:
        raise _ask(name, "configurations", known)
    return parts[0], parts[1] if len(parts) > 1 else None


def _has_options(config: object) -> bool:
    """Whether a card says how its CSV files are to be read in a way of their own."""
    return any(getattr(config, option, None) for option in ("names", "column_names", "skiprows", "index_col"))


def _ask(name: str, what: Literal["splits", "configurations"], known: Collection[str]) -> DataError:
    example = f"{name}:{likely(known)}"
    return DataError(f"data source {name!r}: has the {what} {', '.join(known)}; name one, as in {example}")


def _declares_configurations(card: Path) -> bool:
    """Whether a dataset card says which files belong to which split."""
    return card.is_file() and bool(
        re.match(r"---\r?\n(?:(?!---\r?$).*\n)*?configs:", card.read_text(errors="replace"), re.MULTILINE)
    )
