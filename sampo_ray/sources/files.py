"""Files of records, as streams of numbered objects: JSON, delimited text and tables, compressed or not."""

import codecs
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, cast

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.compression import compr

from sampo_ray.errors import DataError, described
from sampo_ray.sources.delimited import delimited_rows
from sampo_ray.sources.json_files import lines, objects
from sampo_ray.sources.tables import arrow_rows, parquet_rows

Numbered = Iterator[tuple[int, dict[str, object]]]
"""Objects with their 1-based line or position."""

_PACKED = r"(\.(gz|bz2|xz|zst|zstd))?"
FILE = re.compile(rf"\.((jsonl|ndjson|jsonlines|json|csv|tsv){_PACKED}|parquet|pq|arrow|feather)$", re.IGNORECASE)
"""Names of files that can be read."""
ANY_JSON = re.compile(rf"\.json{_PACKED}$", re.IGNORECASE)
"""Names of files that may be anything: rows, or a description of other files."""

_UNREADABLE = {
    r"\.(xlsx?|ods|numbers)$": "save the sheet as CSV (UTF-8)",
    r"\.(zip|tar|tgz|tar\.\w+|7z|rar)$": "unpack it, and name the files in it",
    r"\.(txt|md|text)$": "it has no columns; write a .jsonl with one object a row",
    r"\.(pkl|pickle|pt|npy|npz)$": "it may run code when it is opened; write a .jsonl or .parquet from it",
    r"": "use .jsonl, .json, .csv or .tsv (.gz, .bz2, .xz, .zst), .parquet or .arrow",
}
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
_NOT_DATA = {
    rb"version https://git-lfs": "is a pointer of Git LFS, not the file; get it with `git lfs pull`",
    rb"\s*<(!doctype|html)": "is a web page, not data; name the address that downloads the file",
    rb"%PDF-|PK\x03\x04": "is a document or an archive, not what its name says; export the rows as CSV or JSON Lines",
}


@dataclass
class Meter:
    """How much of the file is read that is read now, from 0 to 1."""

    share: Callable[[], float] = lambda: 0.0


def read_file(fs: AbstractFileSystem, path: str, meter: Meter, field: str | None = None) -> Numbered:
    """The objects of a file. `field`: the key under which a JSON file that is one object has them. Raises DataError."""
    name = path.lower().partition("?")[0]
    with as_data_error(path), fs.open(path, "rb") as raw:
        if re.search(r"\.(parquet|pq|arrow|feather)$", name):
            _check_data(raw.read(512), path)
            raw.seek(0)
            read = parquet_rows if name.endswith(("parquet", "pq")) else arrow_rows
            for number, total, values in read(raw, path):
                meter.share = lambda number=number, total=total: number / total if total else 0.0  # type: ignore[misc]
                yield number, values
            return
        size = fs.size(path)
        meter.share = lambda: raw.tell() / size if size else 0.0
        yield from _text_rows(unpacked(raw, path), path, field)


def _text_rows(file: "io.BufferedReader[io.RawIOBase]", path: str, field: str | None) -> Numbered:
    head = file.peek(512)[:512]
    _check_data(head, path)
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8-sig"
    name = re.sub(rf"{_PACKED}$", "", path.lower().partition("?")[0])
    if name.endswith((".csv", ".tsv")):
        newline = "" if b"\r" in head and b"\n" not in head else "\n"  # "": of old Macs
        text = io.TextIOWrapper(file, encoding, newline=newline)
        yield from delimited_rows(text, path, "\t" if name.endswith("tsv") else None)
    elif field is None and not name.endswith(".json") and not _starts_with(head, b"[") and not wide:
        yield from lines(file, path)
    else:
        yield from objects(io.TextIOWrapper(file, encoding), path, field, may_hold_rows=name.endswith(".json"))


def _starts_with(head: bytes, mark: bytes) -> bool:
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(mark)


def unpacked(raw: IO[bytes], path: str) -> "io.BufferedReader[io.RawIOBase]":
    """The bytes of a file without its compression, which goes by what it holds: names are wrong after downloads."""
    file: io.BufferedReader[io.RawIOBase] = io.BufferedReader(cast(io.RawIOBase, raw))
    head = file.peek(16)
    kind = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), None)
    if kind is None:
        if not head and re.search(rf"\.\w+{_PACKED[:-1]}$", path, re.IGNORECASE):
            raise DataError(f"data source {path!r}: is empty, which no compressed file is; check that it is complete")
        return file
    if kind == "zstd":
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")))
    return io.BufferedReader(cast(io.RawIOBase, compr[kind](file, mode="rb")))


def unreadable(path: str) -> DataError:
    """The error for a file whose name is that of no format that is read."""
    advice = next(text for name, text in _UNREADABLE.items() if re.search(name, path, re.IGNORECASE))
    return DataError(f"data source {path!r}: this format cannot be read; {advice}")


def _check_data(head: bytes, path: str) -> None:
    for mark, what in _NOT_DATA.items():
        if re.match(mark, head, re.IGNORECASE):
            raise DataError(f"data source {path!r}: {what}")


@contextlib.contextmanager
def as_data_error(where: str) -> Iterator[None]:
    """Raises DataError for whatever file systems, decompressors and readers raise."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"data source {where!r}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except Exception as error:  # each file system has its own library's errors, which share no other base
        reason = described(error)
        raise DataError(f"data source {where!r}: cannot be read ({reason}); check that it is complete") from error
