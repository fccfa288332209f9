"""Files of records: JSON Lines, JSON arrays and Parquet, as streams of numbered objects."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from sampo_ray.errors import DataError, described

Numbered = Iterator[tuple[int, dict[str, object]]]
"""Objects with their 1-based line or position."""

CHUNK = 1 << 20
"""Characters of a JSON array that are read at once."""

_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def json_rows(fs: AbstractFileSystem, path: str) -> Numbered:
    """The objects of a file with one a line, or with an array of them; compression goes by the file's name."""
    with as_data_error(path), fs.open(path, "rb", compression="infer") as opened:
        file = io.BufferedReader(opened)
        is_array = file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        yield from _array(io.TextIOWrapper(file, "utf-8-sig"), path) if is_array else _lines(file, path)


def parquet_rows(fs: AbstractFileSystem, path: str) -> Numbered:
    """The rows of a Parquet file. Columns of Arrow's JSON type are what that JSON says."""
    with as_data_error(path), fs.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        decode = _decoder(pa.struct(table.schema_arrow)) or (lambda values: values)
        batches = table.iter_batches(batch_size=256)  # rows in memory at a time
        yield from enumerate((decode(values) for batch in batches for values in batch.to_pylist()), start=1)


@contextlib.contextmanager
def as_data_error(where: str) -> Iterator[None]:
    """Raises DataError for whatever file systems, decompressors and readers raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each file system has its own library's errors, which share no other base
        reason = described(error)
        raise DataError(f"data source {where!r}: cannot be read ({reason}); check that it is complete") from error


def _lines(file: io.BufferedReader, path: str) -> Numbered:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, error) from None
        yield number, _object(path, number, values)


class _Text:
    """A file's text as far as it is needed: what is left of it begins at `at`."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.file, self.text, self.at = file, "", 0

    def more(self) -> bool:
        """Reads on, as much again as is left; False at the end."""
        left = self.text[self.at :]
        piece = self.file.read(max(CHUNK, len(left)))
        self.text, self.at = left + piece, 0
        return bool(piece)

    def mark(self) -> str:
        """Skips spaces, and returns the character after them without passing it; "" at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> object:
        """Passes the next value and returns it. ValueError if there is none."""
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and self.more()):
                    raise


def _array(file: io.TextIOWrapper, path: str) -> Numbered:
    """The elements of an array; one element and one chunk are in memory at a time."""
    text, number = _Text(file), 0
    after = text.mark()  # the bracket
    try:
        while after != "]":
            text.at += 1
            if text.mark() == "]" and number == 0:
                break
            number += 1
            yield number, _object(path, number, text.value())
            if (after := text.mark()) not in ("]", ","):
                raise ValueError(f"{after!r} after entry {number}")
        text.at += 1
        if text.mark():
            raise ValueError("more after the array")
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, DataError) else _not_json(path, number, error) from None


def _object(path: str, number: int, values: object) -> dict[str, object]:
    if isinstance(values, dict):
        return values
    raise DataError(
        f"{path}:{number}: holds a {type(values).__name__}; write one JSON object a line, or an array of objects"
    )


def _not_json(path: str, number: int, error: Exception) -> DataError:
    return DataError(f"{path}:{number}: not valid JSON ({error}); write one JSON object a line, or an array of objects")


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What reads the JSON inside values of a type; None where there is none."""
    if isinstance(kind, pa.JsonType):
        return _unless_none(json.loads)
    if pa.types.is_struct(kind):
        fields = {field.name: read for field in kind if (read := _decoder(field.type))}
        return (
            _unless_none(lambda row: row | {name: read(row[name]) for name, read in fields.items()}) if fields else None
        )
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = _decoder(kind.value_type) if is_list else None
    return _unless_none(lambda values: [inner(value) for value in values]) if inner else None


def _unless_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)
