"""Plain folders: which of their files make a split, and whether they belong together."""

import re
from collections.abc import Collection, Iterable
from itertools import islice

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from sampo_ray.errors import DataError
from sampo_ray.sources.files import ANY_JSON, FILE, Meter, read_file

_SHARD = re.compile(r"([-_.]?\d+([-_]of[-_]\d+)?)?([-_.][0-9a-f]{8,})?$")
_SHARDED = re.compile(r"-\d{5}-of-\d{5}[^/]*$")
_SPLIT_LIKE = re.compile(r"(train|training|test|valid|validation|dev|eval)[-_][a-z]", re.IGNORECASE)
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def data_files(fs: AbstractFileSystem, root: str) -> list[str]:
    """The files of a folder and those inside it that can be read. Beside others a .json may be a description."""
    every = [path for path in sorted(fs.find(root)) if FILE.search(path) and not _hidden(path, root)]
    usual = [path for path in every if not ANY_JSON.search(path)]
    return usual or [path for path in every if path.rpartition("/")[2] not in _DESCRIPTIONS]


def only_split(name: str, fs: AbstractFileSystem, root: str) -> list[str]:
    """All files of a folder. DataError if `datasets` finds several splits in it, or one beside other files."""
    every = data_files(fs, root)
    splits = _splits(root, fs, every)
    if len(splits) > 1:
        raise _ask(name, f"the splits {', '.join(splits)}", f"{name}:{likely(splits)}")
    if splits and len(*splits.values()) < len(every):
        [(split, paths)] = splits.items()
        other = next(path for path in every if path not in paths)
        raise _ask(name, f"the split {split} beside other files ({_inside(other, root)})", f"{name}:{split}")
    return every


def files_of_split(name: str, fs: AbstractFileSystem, root: str, split: str) -> list[str] | None:
    """The files of a split: those that `datasets` finds, or whose names are it and a number; None if there are none."""
    every = data_files(fs, root)
    by_stem = [path for path in every if _stem(path) == split]
    return _splits(root, fs, every).get(split) or by_stem or None


def likely(splits: Collection[str]) -> str:
    """The split to name in an example: the first that is for training, else the first."""
    return next((each for each in splits if each.startswith("train")), next(iter(splits), "train"))


def one_kind(name: str, fs: AbstractFileSystem, root: str, paths: list[str]) -> list[str]:
    """The files, if they belong together. DataError if they are of several folders, formats, splits or layouts."""
    folders = _different(_inside(path.rpartition("/")[0], root) for path in paths)
    if len(folders) > 1:
        first = next(each for each in folders if each)
        raise _ask(name, f"several folders with data ({', '.join(each or '.' for each in folders)})", f"{name}/{first}")
    plain = {_plain(path): path for path in paths}
    if len(plain) < len(paths):
        twice = next(path for path in paths if plain[_plain(path)] != path)
        both = ", ".join(_inside(path, root) for path in (twice, plain[_plain(twice)]))
        raise _ask(name, f"the same file in several formats ({both})", f"{name}/{_inside(twice, root)}")
    stems = {_stem(path): path for path in reversed(paths)}
    if len(stems) > 1 and any(_SPLIT_LIKE.match(stem) or _SHARDED.search(path) for stem, path in stems.items()):
        raise _ask(name, f"several sets of files ({', '.join(sorted(stems))})", f"{name}:{min(stems)}")
    columns = {stem: _columns(fs, path) for stem, path in stems.items()} if len(stems) > 1 else {}
    known = [each for each in columns.values() if each]
    if any(each != known[0] for each in known):
        raise _ask(name, f"files with different columns ({', '.join(sorted(stems))})", f"{name}/{min(stems)}*")
    return paths


def _splits(root: str, fs: AbstractFileSystem, every: list[str]) -> dict[str, list[str]]:
    """The splits that `datasets` finds in a folder, with those of their files that can be read."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    base = fs.unstrip_protocol(root) if "file" not in fs.protocol else root
    found = {}
    for split, patterns in get_data_patterns(base).items():
        matched: set[str] = set()
        for pattern in patterns:
            try:
                matched |= {url_to_fs(path)[1] for path in resolve_pattern(pattern, base)}
            except FileNotFoundError:  # this form of a split's name is not used
                continue
        if paths := [path for path in every if path in matched]:
            found[str(split)] = paths
    return found


def _columns(fs: AbstractFileSystem, path: str) -> frozenset[str]:
    return frozenset(name for _, values in islice(read_file(fs, path, Meter()), 1) for name in values)


def _stem(path: str) -> str:
    """A file's name without extensions and the number of a shard."""
    return _SHARD.sub("", _plain(path).rpartition("/")[2])


def _plain(path: str) -> str:
    return FILE.sub("", path)


def _inside(path: str, root: str) -> str:
    return path.removeprefix(root).strip("/")


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith((".", "__")) for part in _inside(path, root).split("/"))


def _different(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _ask(name: str, has: str, example: str) -> DataError:
    return DataError(
        f"data source {name!r}: holds {has}; name the one to read, as in {example}, or several as a list or a pattern"
    )
