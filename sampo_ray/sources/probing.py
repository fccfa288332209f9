"""How the rows of a source are to be read, found on its first ones before anything else is done with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.described import Entry, unread, unusable
from sampo_ray.sources.reading import Kind, NotFound, choose
from sampo_ray.sources.records import Record, batches, read_records
from sampo_ray.sources.rows import PROBED, Counts, Row, rows_of
from sampo_ray.sources.source import Source
from sampo_ray.sources.unfolding import unfolded

MOST, LONGEST_S = 100_000, 20.0
"""Records, and seconds, after which a source without a usable row is given up."""


@dataclass(frozen=True)
class Probe:
    """What was found: columns of which none is open, and the usable rows of the records that decided."""

    columns: Columns
    rows: list[Row]
    counts: Counts  # of these records
    skipped: Counts  # of the records in front of them, none of which can be used


def probe(entry: Entry, kind: Kind, given: Columns, clock: Callable[[], float] = time.monotonic) -> Probe:
    """Finds the columns of a source that `given` leaves open, on the first PROBED records that hold a usable row.

    DataError where there are none, and where the records can be read in two ways that differ.
    """
    first: list[Record] = []
    columns, failed, skipped, began = None, None, Counts(), clock()
    for records in batches(read_records(entry.source), PROBED):
        first, counts = first or records, Counts()
        try:
            columns = _chosen(entry, kind, records, given)
            if rows := list(rows_of(unfolded(records, columns), kind, columns, counts)):
                return Probe(columns, rows, counts, skipped)
        except NotFound as error:
            failed, counts = failed or error, Counts(rows=len(records))
        skipped.add(counts)
        if skipped.rows >= MOST or clock() - began > LONGEST_S:
            break
    if failed is not None and columns is None:
        raise unread(entry, kind, first, failed, given)
    raise unusable(entry, first, columns, skipped)


def completed(sources: Sequence[Source], kind: Kind) -> list[Source]:
    """Sources whose columns are complete, with what is open found. DataError."""
    entries = [Entry(source.name, index, len(sources)) for index, source in enumerate(sources)]
    return [
        source if source.columns.complete else replace(source, columns=probe(entry, kind, source.columns).columns)
        for entry, source in zip(entries, sources, strict=True)
    ]


def _chosen(entry: Entry, kind: Kind, records: list[Record], given: Columns) -> Columns:
    try:
        return choose(records, kind, given)
    except NotFound:
        raise
    except DataError as error:
        raise type(error)(f"data source {entry.source!r}: {error}") from None
