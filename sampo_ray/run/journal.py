"""An append-only journal of JSON records as immutable JSONL files, on disks and object stores; old files are merged."""

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from sampo_ray.run.storage import Place

MERGE_AT = 64  # files of one time span that are merged before the span is over
ATTEMPTS = 5


class _Entry(NamedTuple):
    """What the index knows of a record: its time, and that it is bytes `start` to `end` of a segment."""

    segment: str
    start: int
    end: int
    time: float


class Journal:
    """JSON objects with a unique `id` and a `time` (seconds since 1970), in segments `<first time>-<random>.jsonl`.

    A segment appears as a whole and never changes. Segments of the same span of `span_s` seconds are merged into ones
    of at most `most` records and `most_bytes`, since only whole segments are dropped. A merged segment is written
    before its parts are removed: a reader may find a record twice, which counts once, but never misses one. Several
    processes may write. Only an index is in memory. Methods may block, and must be called by one thread at a time.
    """

    def __init__(self, folder: Place, span_s: float, most: int = 4096, most_bytes: int = 16 << 20) -> None:
        self._folder, self._span_ms = folder, max(1, int(1000 * span_s))
        self._most, self._most_bytes = most, most_bytes
        self._segments: dict[str, int] = {}  # bytes by name
        self._index: dict[str, _Entry] = {}

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return sum(self._segments.values())

    def refresh(self) -> None:
        """Reads what other processes have written, merged or dropped since the last time."""
        for _ in range(ATTEMPTS):
            names = [name for name in self._folder.names() if name.endswith(".jsonl")]
            self._forget(self._segments.keys() - names)
            with suppress(FileNotFoundError):  # merged or dropped since it was listed
                for name in names:
                    if name not in self._segments:
                        self._add_segment(name, self._folder.at(name).read())
                return
        raise OSError(f"{self._folder.url}: its files change faster than they can be read; try again")

    def append(self, records: Sequence[bytes]) -> None:
        """Stores records (one line of JSON each) as one segment, durably; those with a known id are left out."""
        new = {key: line for line in records if (key := json.loads(line)["id"]) not in self._index}
        if new:
            self._write(list(new.values()))

    def get(self, record_id: str) -> bytes | None:
        """The JSON of a record in the index; None if it is unknown, or was dropped."""
        for _ in range(ATTEMPTS):
            entry = self._index.get(record_id)
            if entry is None:
                return None
            try:
                return self._folder.at(entry.segment).read(entry.start, entry.end)
            except FileNotFoundError:  # another process has merged its segment
                self.refresh()
        return None

    def records(self) -> list[bytes]:
        """The JSON of all records in the index, oldest first."""
        for _ in range(ATTEMPTS):
            try:
                found = self._read(list(self._segments))
            except FileNotFoundError:
                self.refresh()
            else:
                return [found[key] for key in sorted(found, key=lambda key: (self._index[key].time, key))]
        raise OSError(f"{self._folder.url}: its files change faster than they can be read; try again")

    def drop(self, before: float, most: int, most_bytes: int) -> None:
        """Removes segments whose records are all older than `before`, then the oldest segments until at most `most`
        records and `most_bytes` are left.
        """
        newest: dict[str, float] = dict.fromkeys(self._segments, 0.0)
        counts = Counter(entry.segment for entry in self._index.values())
        for entry in self._index.values():
            newest[entry.segment] = max(newest[entry.segment], entry.time)
        records, nbytes = len(self), self.nbytes
        for name in sorted(newest, key=lambda each: (newest[each], each)):
            if newest[name] >= before and records <= most and nbytes <= most_bytes:
                return
            records, nbytes = records - counts[name], nbytes - self._segments[name]
            self._remove([name])

    def merge(self, now: float) -> None:
        """Merges the segments of each time span that is over or has MERGE_AT segments."""
        for over, names in self._groups(now):
            if len(names) < (2 if over else MERGE_AT):
                continue
            try:
                lines = self._read(names)
            except FileNotFoundError:  # another process is merging them
                self.refresh()
                return
            if lines:
                self._write(list(lines.values()))
            self._remove(names)

    def _groups(self, now: float) -> list[tuple[bool, list[str]]]:
        """Segments that may be merged into one, and whether their time span is over."""
        counts = Counter(entry.segment for entry in self._index.values())
        groups: list[tuple[bool, list[str]]] = []
        last, records, nbytes = -1, 0, 0
        for name in sorted(self._segments):
            span, more, more_bytes = int(name.split("-")[0]) // self._span_ms, counts[name], self._segments[name]
            records, nbytes = records + more, nbytes + more_bytes
            if span != last or records > self._most or nbytes > self._most_bytes:
                groups.append((span < int(1000 * now) // self._span_ms, []))
                last, records, nbytes = span, more, more_bytes
            groups[-1][1].append(name)
        return groups

    def _read(self, names: Sequence[str]) -> dict[str, bytes]:
        """The records of these segments that are in the index, by id."""
        contents = {name: self._folder.at(name).read() for name in names}
        entries = {key: entry for key, entry in self._index.items() if entry.segment in contents}
        return {key: contents[entry.segment][entry.start : entry.end] for key, entry in entries.items()}

    def _write(self, lines: Sequence[bytes]) -> None:
        first = min(json.loads(line)["time"] for line in lines)
        name, content = f"{int(1000 * first):014d}-{uuid.uuid4().hex}.jsonl", b"".join(line + b"\n" for line in lines)
        self._folder.at(name).write(content)
        for line in lines:
            self._index.pop(json.loads(line)["id"], None)
        self._add_segment(name, content)

    def _add_segment(self, name: str, content: bytes) -> None:
        self._segments[name] = len(content)
        start = 0
        for line in content.splitlines(keepends=True):
            record = json.loads(line)
            self._index.setdefault(record["id"], _Entry(name, start, start + len(line) - 1, record["time"]))
            start += len(line)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._folder.at(name).remove()
        self._forget(set(names))

    def _forget(self, names: set[str]) -> None:
        for name in names:
            del self._segments[name]
        if names:
            self._index = {key: entry for key, entry in self._index.items() if entry.segment not in names}
