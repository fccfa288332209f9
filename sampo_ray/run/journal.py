"""Append-only records in a folder, on object stores too: small immutable JSONL files, put together as they age."""

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sampo_ray.run.storage import Place

MERGE_AT = 64
"""Files of one span of time that are put together although more may come."""
ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a record is: bytes `start` to `end` of a segment."""

    segment: str
    start: int
    end: int
    time: float


class Journal:
    """JSON objects with a unique `id` and a `time` (seconds since 1970), in segments `<first time>-<random>.jsonl`.

    A segment is complete once it is there and never changes. Those of the same span of `together_s` seconds become one,
    unless that had more than `most` records or `most_bytes` (what is dropped later is whole segments). The new one is
    there before the old ones go, so a reader may meet a record twice, which counts once, but never misses one. Several
    processes may write. Only an index stays in memory. All methods may block; one thread at a time.
    """

    def __init__(self, folder: Place, together_s: float, most: int = 4096, most_bytes: int = 16 << 20) -> None:
        self._folder, self._together_ms = folder, max(1, int(1000 * together_s))
        self._most, self._most_bytes = most, most_bytes
        self._segments: dict[str, int] = {}
        self._spots: dict[str, _Spot] = {}

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._spots

    def __len__(self) -> int:
        return len(self._spots)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(self._segments.values())

    def refresh(self) -> None:
        """Takes note of what other processes have written, put together or dropped."""
        for _ in range(ATTEMPTS):
            names = [name for name in self._folder.names() if name.endswith(".jsonl")]
            self._forget(self._segments.keys() - names)
            if all(self._load(name) for name in names if name not in self._segments):
                return
        raise OSError(f"{self._folder.url}: its files change faster than they can be read")

    def append(self, records: Sequence[bytes]) -> None:
        """Stores records (JSON, without line breaks) as one new segment; durable when it returns. Known ids are left
        out.
        """
        known = self._spots
        new = {key: line for line in records if (key := json.loads(line)["id"]) not in known}
        if new:
            self._write(list(new.values()))

    def get(self, record_id: str) -> dict[str, Any] | None:
        """A record that this process knows of; None if it is gone, or was never there."""
        for _ in range(ATTEMPTS):
            spot = self._spots.get(record_id)
            if spot is None:
                return None
            try:
                return json.loads(self._folder.at(spot.segment).read(spot.start, spot.end))
            except FileNotFoundError:  # another process has put it together with others
                self.refresh()
        return None

    def records(self) -> list[dict[str, Any]]:
        """All records that this process knows of, oldest first."""
        for _ in range(ATTEMPTS):
            try:
                found = [json.loads(line) for line in self._read(list(self._segments))]
            except FileNotFoundError:
                self.refresh()
            else:
                return sorted(found, key=lambda record: (record["time"], record["id"]))
        raise OSError(f"{self._folder.url}: its files change faster than they can be read")

    def drop(self, before: float, most: int, most_bytes: int) -> None:
        """Removes segments of nothing but records older than `before`, and the oldest ones until no more than `most`
        records in `most_bytes` are left.
        """
        newest: dict[str, float] = dict.fromkeys(self._segments, 0.0)
        count = Counter(spot.segment for spot in self._spots.values())
        for spot in self._spots.values():
            newest[spot.segment] = max(newest[spot.segment], spot.time)
        records, nbytes = len(self), self.nbytes
        for name in sorted(newest, key=lambda each: (newest[each], each)):
            if newest[name] >= before and records <= most and nbytes <= most_bytes:
                return
            records, nbytes = records - count[name], nbytes - self._segments[name]
            self._remove([name])

    def merge(self, now: float) -> None:
        """Puts together the segments of each span of time that is over, or that has very many."""
        for over, names in self._groups(now):
            if len(names) < (2 if over else MERGE_AT):
                continue
            try:
                lines = self._read(names)
            except FileNotFoundError:  # another process is at it
                self.refresh()
                return
            if lines:
                self._write(lines)
            self._remove(names)

    def _groups(self, now: float) -> list[tuple[bool, list[str]]]:
        """Segments of the same span that may become one, and whether the span is over."""
        counts = Counter(spot.segment for spot in self._spots.values())
        groups: list[tuple[bool, list[str]]] = []
        last, records, nbytes = -1, 0, 0
        for name in sorted(self._segments):
            span, more, more_bytes = int(name.split("-")[0]) // self._together_ms, counts[name], self._segments[name]
            records, nbytes = records + more, nbytes + more_bytes
            if span != last or records > self._most or nbytes > self._most_bytes:
                groups.append((span < int(1000 * now) // self._together_ms, []))
                last, records, nbytes = span, more, more_bytes
            groups[-1][1].append(name)
        return groups

    def _read(self, names: Sequence[str]) -> list[bytes]:
        """The records that are known from these segments."""
        contents = {name: self._folder.at(name).read() for name in names}
        spots = [spot for spot in self._spots.values() if spot.segment in contents]
        return [contents[spot.segment][spot.start : spot.end] for spot in spots]

    def _write(self, lines: Sequence[bytes]) -> None:
        first = min(json.loads(line)["time"] for line in lines)
        name, content = f"{int(1000 * first):014d}-{uuid.uuid4().hex}.jsonl", b"".join(line + b"\n" for line in lines)
        self._folder.at(name).write(content)
        for line in lines:
            self._spots.pop(json.loads(line)["id"], None)
        self._index(name, content)

    def _load(self, name: str) -> bool:
        try:
            content = self._folder.at(name).read()
        except FileNotFoundError:
            return False
        self._index(name, content)
        return True

    def _index(self, name: str, content: bytes) -> None:
        self._segments[name] = len(content)
        start = 0
        for line in content.splitlines(keepends=True):
            record = json.loads(line)
            self._spots.setdefault(record["id"], _Spot(name, start, start + len(line) - 1, record["time"]))
            start += len(line)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._folder.at(name).remove()
        self._forget(set(names))

    def _forget(self, names: set[str]) -> None:
        for name in names:
            del self._segments[name]
        if names:
            self._spots = {key: spot for key, spot in self._spots.items() if spot.segment not in names}
