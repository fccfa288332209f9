"""Parquet and Arrow files, batch by batch."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sampo_ray.errors import DataError

BATCH_BYTES = 16 << 20
"""Bytes of rows in memory at a time, about."""
BATCH_ROWS = 256
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Counted = Iterator[tuple[int, int | None, dict[str, object]]]
"""Rows with their 1-based numbers and how many there are, where that is known."""


def parquet_rows(raw: IO[bytes], path: str) -> Counted:
    """The rows of a Parquet file. Columns of Arrow's JSON type are what that JSON says; bytes are text, or their
    number where they are none."""
    table = pq.ParquetFile(raw)
    groups = [table.metadata.row_group(at) for at in range(table.metadata.num_row_groups)]
    size = max(1, sum(group.total_byte_size for group in groups))
    total = table.metadata.num_rows
    batches = table.iter_batches(batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES * total // size)))
    return _rows(batches, table.schema_arrow, total, path)


def arrow_rows(raw: IO[bytes], path: str) -> Counted:
    """The rows of an Arrow file (Feather 2) or of an Arrow stream, as `datasets` writes them; values as above."""
    is_file = raw.read(6) == b"ARROW1"
    if not is_file:
        raw.seek(-len(_END_OF_STREAM), 2)
        if raw.read() != _END_OF_STREAM:
            raise DataError(f"data source {path!r}: is cut off, or no Arrow file; check that it is complete")
    raw.seek(0)
    if is_file:
        file = pa.ipc.open_file(raw)
        return _rows((file.get_batch(at) for at in range(file.num_record_batches)), file.schema, None, path)
    stream = pa.ipc.open_stream(raw)
    return _rows(stream, stream.schema, None, path)


def _rows(batches: Iterator[pa.RecordBatch], schema: pa.Schema, total: int | None, path: str) -> Counted:
    repeated = [name for name, times in Counter(schema.names).items() if times > 1]
    if repeated:
        raise DataError(f"data source {path!r}: the column {repeated[0]!r} is there twice; give each a name of its own")
    decode = _decoder(pa.struct(schema)) or (lambda values: values)
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, total, decode(values)


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What reads the JSON and the bytes inside values of a type; None where there are none."""
    if isinstance(kind, pa.JsonType):
        return _unless_none(json.loads)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _unless_none(_text_of)
    if pa.types.is_struct(kind):
        fields = {field.name: read for field in kind if (read := _decoder(field.type))}
        return (
            _unless_none(lambda row: row | {name: read(row[name]) for name, read in fields.items()}) if fields else None
        )
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = _decoder(kind.value_type) if is_list else None
    return _unless_none(lambda values: [inner(value) for value in values]) if inner else None


def _text_of(value: bytes) -> str:
    """Some writers do not say that bytes are text; those of images are not, and nobody needs them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"({len(value)} bytes)"


def _unless_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)
