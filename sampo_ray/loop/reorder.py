"""Parts with their rows in another order, by reading and writing each row twice however many parts there are.

Each group of old parts is read once, and its rows are written to one file in pieces: one for each group of new parts,
which is then joined from its pieces. There are at most GROUPS groups of either kind, so at most GROUPS**2 pieces, and a
task holds the rows of one group. The driver sees where pieces begin. Their files take about as much as the rows do, and
are gone once the new parts are there.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray

from sampo_ray.loop.blocks import StageOutput, Work
from sampo_ray.loop.tokenizing import tasks_at_once
from sampo_ray.run.parts import Part, part_place
from sampo_ray.run.storage import Place

GROUPS, GROUP_ROWS = 128, 4096
"""How many groups there are at most, and the rows of one, unless that would be too many groups. The last part of a
group may reach beyond."""


def reorder(parts: Sequence[Part], order: np.ndarray, out: StageOutput, rows_per_part: int) -> list[Part]:
    """The rows of `parts` in another order, or some of them, as parts of `rows_per_part`, which have no copies in the
    object store. Parts that are there already stay as they are; once there is `enough`, others stay missing.

    `order[i]` is the row, counted over all of `parts`, that becomes row i. Raises StageError as `run_stage` does.
    """
    plan = Plan.of([part.rows for part in parts], order, rows_per_part)
    places = [part_place(out.folder, index) for index in range(len(plan.new_rows))]
    missing, names = list[int](), set(out.folder.names())
    for group, span in enumerate(plan.new):
        if any(place.name not in names for place in places[span]):
            missing.append(group)
        else:
            out.progress(sum(plan.new_rows[span]))
    pieces = Place(f"{out.folder.url}.pieces")
    if missing:
        _make(plan, parts, missing, replace(out, folder=pieces), out)
    pieces.remove()
    return [Part(place, rows) for place, rows in zip(places, plan.new_rows, strict=True)]


@dataclass(frozen=True)
class Plan:
    """Which rows go where.

    `order` is that of `reorder`; `by_source` are the new rows in the order of the old ones. `starts` is where each old
    part begins, and where the last ends. `old` and `new` are the groups, as slices of parts; `new_rows` the rows of
    each new part, and `bounds` where each group of them begins, in rows, and where the last ends.
    """

    order: np.ndarray
    by_source: np.ndarray
    starts: np.ndarray
    old: list[slice]
    new: list[slice]
    new_rows: list[int]
    bounds: np.ndarray

    @staticmethod
    def of(rows: Sequence[int], order: np.ndarray, rows_per_part: int) -> "Plan":
        starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        size = max(GROUP_ROWS, -(-int(starts[-1]) // GROUPS))
        group_of = np.minimum(starts[:-1], starts[-1] - 1) // size  # parts without rows at the end are in the last
        firsts = np.flatnonzero(np.diff(group_of, prepend=-1)).tolist()
        old = [slice(a, b) for a, b in itertools.pairwise([*firsts, len(rows)])]
        new_rows = [min(rows_per_part, len(order) - at) for at in range(0, len(order), rows_per_part)]
        step = -(-size // rows_per_part)
        new = [slice(at, at + step) for at in range(0, len(new_rows), step)]
        bounds = np.append(np.arange(0, len(order), step * rows_per_part), len(order))
        return Plan(order, np.argsort(order, kind="stable"), starts, old, new, new_rows, bounds)

    def used(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a group of old parts: the rows that are used, counted within it and ascending, and for each the group of
        new parts that it goes to."""
        begin, end = (int(self.starts[part]) for part in (self.old[group].start, self.old[group].stop))
        new = self.by_source[slice(*np.searchsorted(self.order, [begin, end], sorter=self.by_source))]
        return self.order[new] - begin, np.searchsorted(self.bounds, new, side="right") - 1

    def source(self, group: int) -> np.ndarray:
        """The old rows that become those of a group of new parts."""
        return self.order[self.bounds[group] : self.bounds[group + 1]]


@dataclass(frozen=True)
class Rows:
    """Some rows, ascending, of parts that lie end to end."""

    parts: Sequence[Part]
    rows: np.ndarray

    def table(self) -> pa.Table:
        """Them alone: one part is in memory at a time."""
        found, first = list[pa.Table](), 0
        for part in self.parts:
            begin, end = np.searchsorted(self.rows, [first, first + part.rows])
            if begin < end:
                found.append(part.table().take(pa.array(self.rows[begin:end] - first)))
            first += part.rows
        return pa.concat_tables(found)

    def again(self) -> "Rows":
        """From files, as copies in the object store may be lost."""
        return replace(self, parts=[replace(part, ref=None) for part in self.parts])


@dataclass(frozen=True)
class Piece:
    """Bytes of a file that hold a table."""

    place: Place
    start: int
    end: int

    def table(self) -> pa.Table:
        content = pa.BufferReader(self.place.read(self.start, self.end))
        return pa.ipc.open_stream(pa.CompressedInputStream(content, "zstd")).read_all()


def _make(plan: Plan, parts: Sequence[Part], missing: Sequence[int], between: StageOutput, out: StageOutput) -> None:
    """Makes groups of new parts."""
    pieces = _split(plan, parts, between) if len(plan.old) > 1 else []
    if out.enough():
        return

    def start(number: int, place: Place, again: bool) -> ray.ObjectRef:
        source, span = plan.source(group := missing[number]), plan.new[group]
        sources: Sequence[Rows | Piece] = [of[group] for of in pieces if of[group].start < of[group].end]
        if not sources:
            rows = Rows(parts, np.sort(source))
            sources = [rows.again() if again else rows]
        rows_of_parts = dict(zip(range(span.start, span.stop), plan.new_rows[span], strict=False))
        return _join.remote(out.folder, rows_of_parts, np.argsort(np.argsort(source)), sources)

    work = Work[int](out, tasks_at_once(), range(len(missing)), start, lambda ref: ref)
    for _, _, rows in work.completed():
        out.progress(rows)


def _split(plan: Plan, parts: Sequence[Part], out: StageOutput) -> list[list[Piece]]:
    """Of each group of old parts the pieces for each group of new ones, empty where it has no rows for it."""

    def start(group: int, place: Place, again: bool) -> ray.ObjectRef:
        used, goes_to = plan.used(group)
        rows = Rows(parts[plan.old[group]], used)
        file = out.folder.at(f"{group:05d}.arrows")
        return _write_pieces.remote(file, rows.again() if again else rows, goes_to, len(plan.new))

    work = Work[list[Piece]](out, tasks_at_once(), range(len(plan.old)), start, lambda ref: ref)
    return [pieces for _, _, pieces in sorted(work.completed(), key=lambda made: made[0])]


@ray.remote(num_cpus=0.2)
def _write_pieces(out: Place, rows: Rows, goes_to: np.ndarray, groups: int) -> list[Piece]:
    """Writes a file of pieces, the rows of each in the order of the old parts."""
    by_group = np.argsort(goes_to, kind="stable")
    cuts = np.searchsorted(goes_to[by_group], np.arange(groups + 1)).tolist()
    if not len(rows.rows):
        return [Piece(out, 0, 0)] * groups
    table = rows.table().combine_chunks().take(pa.array(by_group))
    contents = [_compressed(table.slice(begin, end - begin)) for begin, end in itertools.pairwise(cuts)]
    out.write(b"".join(contents))
    ends = itertools.accumulate(map(len, contents), initial=0)
    return [Piece(out, begin, end) for begin, end in itertools.pairwise(ends)]


def _compressed(table: pa.Table) -> bytes:
    """A piece's bytes, compressed as a whole: pieces are small, and each buffer on its own would take several times as
    long. Without rows there are none."""
    if not table.num_rows:
        return b""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@ray.remote(num_cpus=0.2)
def _join(out: Place, rows: dict[int, int], order: np.ndarray, sources: Sequence[Rows | Piece]) -> int:
    """Writes parts, of which `rows` has the numbers of rows, from what lies in `sources`, end to end, in an order."""
    table = pa.concat_tables(source.table() for source in sources).combine_chunks().take(pa.array(order))
    table, at = table.replace_schema_metadata(None), 0
    for index, count in rows.items():
        part_place(out, index).write_table(table.slice(at, count))
        at += count
    return at
