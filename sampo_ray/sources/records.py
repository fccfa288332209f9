"""Data sources, read as streams of records.

A source is a file of JSON, CSV, TSV (these compressed or not), Parquet or Arrow, a glob or folder of such files, a
folder written by `datasets`' `save_to_disk`, or a dataset on the Hugging Face hub. Files may be at any fsspec URL.
Behind a colon stands what of it is meant: `org/name:train_prefs` (a split), `org/name:helpful:train` (a configuration
and its split), `answers.json:train` (the key under which a JSON file has its rows).

Files are read here, wherever they are, so that text stays the text of the file. `datasets` says which files a split
has, and reads what it has saved itself and other formats.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from fsspec.core import has_magic

from sampo_ray.errors import DataError
from sampo_ray.sources.files import Meter, as_data_error, read_file
from sampo_ray.sources.places import Dataset, Files, chosen_split, find

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row. `position` is unique in its source and the same on every machine, `where` a 1-based `file:line`."""

    position: str
    where: str
    values: dict[str, object]


@dataclass
class Opened:
    """A source whose files are known. It can be read once."""

    name: str
    place: Files | Dataset
    _meter: Meter = field(default_factory=Meter)
    _done: int = 0  # bytes of the files that have been read
    _bytes: int = 0  # of all files

    def records(self) -> Iterator[Record]:
        """Streams the rows in an order that depends on the source alone. Raises DataError."""
        if isinstance(self.place, Dataset):
            return self._of_dataset(self.place)
        return self._of_files(self.place)

    def share_read(self) -> float | None:
        """How much has been read, from 0 to 1, by bytes or rows; None where the size of the whole is not known."""
        if isinstance(self.place, Dataset):
            return self._meter.share() if self._bytes else None
        return (self._done + self._meter.share() * self._size) / self._bytes if self._bytes else None

    def _of_files(self, files: Files) -> Iterator[Record]:
        with as_data_error(self.name):
            sizes = [files.fs.size(path) or 0 for path in files.paths]
        self._bytes = sum(sizes)
        for path, self._size in zip(files.paths, sizes, strict=True):
            self._meter = Meter()
            for number, values in read_file(files.fs, path, self._meter, files.field):
                yield Record(f"{files.name(path)}:{number}", f"{path}:{number}", values)
            self._done, self._meter = self._done + self._size, Meter()

    def _of_dataset(self, dataset: Dataset) -> Iterator[Record]:
        with as_data_error(self.name):
            loaded = dataset.load()
            split = ""
            if isinstance(loaded, dict):
                split = chosen_split(dataset.name, dataset.split, [str(each) for each in loaded])
                loaded = loaded[split]
            elif dataset.split is not None:
                raise DataError(f"data source {self.name!r}: has no splits; drop :{dataset.split}")
            self._bytes = len(loaded) if isinstance(loaded, Sized) else 0
            for number, values in enumerate(cast(Iterable[dict[str, object]], loaded), start=1):
                self._meter.share = lambda number=number: number / self._bytes  # type: ignore[misc]
                yield Record(f"{split or 'row'}:{number}", f"{self.name}:{number}", values)


def open_source(name: str) -> Opened:
    """Finds what a source names. Raises DataError."""
    with as_data_error(name):
        return Opened(name, find(name))


def read_records(name: str) -> Iterator[Record]:
    """Streams a source's rows in an order that depends on the source alone. Raises DataError."""
    yield from open_source(name).records()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in their order, in lists of `size`; the last one may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def is_here(source: str) -> bool:
    """Whether a source names something on this machine: a path, a pattern in a folder, or one with a part of it."""
    if has_magic(source):
        return Path(re.split(r"[*?\[]", source, maxsplit=1)[0].rpartition("/")[0] or ".").is_dir()
    name, _, _ = source.rpartition(":")
    outer, _, _ = name.rpartition(":")
    return any(each and Path(each).exists() for each in (source, name, outer))
