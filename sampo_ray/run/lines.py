"""Files of JSON objects, one a line, that one process appends to and any may read.

Object storage cannot append: there the last part of a file is replaced, and once that is long, another is begun beside
it (`metrics.jsonl.000001` and so on), so that a line costs the same however many there are.

A crash, a full disk or a power failure can cut the last line short. No object is the beginning of another one, so such
a line is always recognised: readers leave it out, and the next append removes it first.
"""

import functools
import json
import logging
import os
import re
from typing import Any

from sampo_ray.errors import DataError
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)
PART_BYTES = 128 << 10
Record = dict[str, Any]
_OBJECT = re.compile(rb'\{"')


def append(file: Place, record: str) -> None:
    """Adds a line, durably: a local file is synchronised with the disk, the last part of a remote one replaced."""
    line = record.encode() + b"\n"
    if not file.local:
        parts = _parts(file)
        content = _mended(parts[-1].read()) if parts else b""
        if len(content) > PART_BYTES:
            _part(file, len(parts)).write(line)
        else:
            (parts[-1] if parts else file).write(content + line)
        return
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    with open(file.path, "a+b") as out:
        size = out.tell()
        if size and os.pread(out.fileno(), 1, size - 1) != b"\n":
            out.seek(0)
            mended = _mended(out.read())
            out.truncate(min(size, len(mended)))
            line = mended[size:] + line
        out.write(line)
        out.flush()
        os.fsync(out.fileno())


def read(file: Place, last_bytes: int | None = None) -> bytes:
    """The file with all of its parts, or its last bytes; empty where there is none."""
    found, parts = b"", _parts(file)
    while parts and (last_bytes is None or len(found) < last_bytes):
        found = parts.pop().read(None if last_bytes is None else len(found) - last_bytes) + found
    return found


def _parts(file: Place) -> list[Place]:
    if file.local:
        return [file] if file.exists() else []
    names = Place(file.url.removesuffix(f"/{file.name}")).names()
    later = sum(re.fullmatch(rf"{re.escape(file.name)}\.[0-9]{{6}}", name) is not None for name in names)
    return [_part(file, number) for number in range(later + 1)] if file.name in names else []


def _part(file: Place, number: int) -> Place:
    return Place(f"{file.url}.{number:06d}") if number else file


def records(content: bytes, name: str) -> list[Record]:
    """The objects in the file `name`. DataError for a line that is neither an object nor the beginning of one."""
    *lines, last = content.split(b"\n")
    found = [each for number, line in enumerate(lines, 1) for each in _objects(line.strip(b"\0 \r"), name, number)]
    whole = as_object(last)  # else it is being written, or was cut short
    return [*found, whole] if whole is not None else found


def _objects(line: bytes, name: str, number: int) -> list[Record]:
    """What is in a line that has ended: an object. Behind one that was cut short another may have been written."""
    if not line:
        return []
    if (whole := as_object(line)) is not None:
        return [whole]
    if not line.startswith(b"{"):
        raise DataError(f"{name}, line {number}: is no JSON object; remove this line")
    _warn(name, line)
    behind = (as_object(line[begin.start() :]) for begin in _OBJECT.finditer(line, 1))
    return [each for each in behind if each is not None][:1]


@functools.lru_cache(maxsize=64)  # the files are read again and again
def _warn(name: str, line: bytes) -> None:
    logger.warning("%s: a line of %d bytes was cut short, and is left out", name, len(line))


def as_object(line: bytes) -> Record | None:
    """The object that a line holds; None if it holds none, as a line that was cut short does."""
    try:
        found = json.loads(line.decode())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _mended(content: bytes) -> bytes:
    """The content up to the end of its last whole line."""
    before, end, last = content.rpartition(b"\n")
    return content + b"\n" if as_object(last) is not None else before + end
