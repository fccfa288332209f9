"""The records of a run's sources in chunks of bytes: what tokenizing tasks get and the run's fingerprint hashes."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sampo_ray.sources.records import Record, batches, open_source
from sampo_ray.sources.source import Source, drawn
from sampo_ray.sources.unfolding import unfolded

CHUNK_ROWS = 512


@dataclass(frozen=True)
class Chunk:
    """What is known of `rows` consecutive records of the source with that index, besides their content.

    `digest` is the content's SHA-256 (hex), without names of folders. `share` of all that the sources hold has been
    read by now (0..1); None where that is not known.
    """

    source: int
    rows: int
    digest: str
    share: float | None


@dataclass
class Reading:
    """Reads sources once, in order. Memory: one chunk, and what unfolding holds."""

    sources: Sequence[Source]
    seed: int  # of the run: it decides which rows are drawn where `share` is below 1

    def chunks(self) -> Iterator[tuple[Chunk, bytes]]:
        """All records that are used, each chunk from one source. DataError for a source that cannot be read."""
        for index, source in enumerate(self.sources):
            opened = open_source(source.name)
            records = unfolded(opened.records(), source.columns)
            if source.share < 1:
                records = _used(records, source.share, self.seed, index)
            for some in batches(records, CHUNK_ROWS):
                content, digest = encoded([replace(each, position=source.mark + each.position) for each in some])
                yield Chunk(index, len(some), digest, self._share(index, opened.share_read())), content

    def _share(self, index: int, of_this: float | None) -> float | None:
        """Each source counts as much as another, as its size is not known before it is opened."""
        return None if of_this is None else (index + of_this) / len(self.sources)


def encoded(records: Sequence[Record]) -> tuple[bytes, str]:
    """Records as bytes that `decoded` reads, and the SHA-256 (hex) of their positions and values.

    What JSON does not know (dates, decimals, bytes) becomes text.
    """
    rows = json.dumps([[each.position, each.values] for each in records], default=str, separators=(",", ":")).encode()
    where = json.dumps([each.where for each in records]).encode()
    return where + b"\n" + rows, hashlib.sha256(rows).hexdigest()


def decoded(content: bytes) -> list[Record]:
    """The records that `encoded` has written."""
    where, _, rows = content.partition(b"\n")
    both = zip(json.loads(where), json.loads(rows), strict=True)
    return [Record(position, where, values) for where, (position, values) in both]


def fingerprint(digests: Iterable[str]) -> str:
    """SHA-256 (hex) of all that was read, from the digests of its chunks."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def expected(rows: int, share: float | None) -> int | None:
    """How many rows there will be when `rows` are those of `share` of the sources; None where that is not known."""
    return round(rows / share) if share else None


def _used(records: Iterable[Record], share: float, seed: int, source: int) -> Iterator[Record]:
    """The share of a source's records that a run uses, drawn anew from every CHUNK_ROWS of them."""
    start = 0
    for some in batches(records, CHUNK_ROWS):
        yield from itertools.compress(some, drawn(share, seed, source, start, len(some)))
        start += len(some)
