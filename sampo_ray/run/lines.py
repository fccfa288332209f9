"""Files of JSON objects, one a line, that one process appends to and any may read.

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
Record = dict[str, Any]
_OBJECT = re.compile(rb'\{"')


def append(file: Place, record: str) -> None:
    """Adds a line, durably: a local file is synchronised with the disk, a remote one is replaced as a whole."""
    line = record.encode() + b"\n"
    if not file.local:
        file.write(_mended(file.read() if file.exists() else b"") + line)
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
