"""Parts in another order: the rows that a plain permutation gives, by reading each part once."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sampo_ray.config.run import load_config
from sampo_ray.data.preferences import PAIRS
from sampo_ray.errors import StageError
from sampo_ray.loop import reorder as reordering
from sampo_ray.loop import stages
from sampo_ray.loop.blocks import StageOutput
from sampo_ray.loop.reorder import Plan, reorder
from sampo_ray.loop.rounds import Round
from sampo_ray.run.directory import create_run
from sampo_ray.run.parts import Part, part_place
from sampo_ray.run.storage import Place
from sampo_ray.training.streams import Stream
from tests.in_process import in_process  # noqa: F401
from tests.notes import Notes

pytestmark = pytest.mark.usefixtures("in_process")
examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def table_of(rows: Sequence[int]) -> pa.Table:
    sides = [[[row] * (row % 3 + n) for row in rows] for n in (1, 2, 3)]
    return pa.table([[f"pair-{row}" for row in rows], *sides, *[[None] * len(rows)] * 2], schema=PAIRS)


def parts_in(folder: Place, rows: Sequence[int], first: int = 0) -> list[Part]:
    parts = []
    for index, count in enumerate(rows):
        place = part_place(folder, index)
        place.write_table(table_of(range(first, first + count)).replace_schema_metadata({"of": "a part"}))
        parts.append(Part(place, count))
        first += count
    return parts


def ids(parts: Sequence[Part]) -> list[int]:
    return [int(name.removeprefix("pair-")) for part in parts for name in part.table()["id"].to_pylist()]


@contextmanager
def folder() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as path:
        yield Place(path)


@examples
@given(sizes, st.integers(0, 9), st.integers(1, 7), st.integers(1, 6), st.integers(1, 8), st.randoms())
def test_rows_come_in_the_order_that_a_plain_permutation_gives(rows, seed, per_part, groups, group_rows, random):
    total = sum(rows)
    order = np.random.default_rng(seed).permutation(total)[: random.randint(1, total)]
    with folder() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reordering, "GROUPS", groups)
        patch.setattr(reordering, "GROUP_ROWS", group_rows)
        reads = Counter[str]()
        read = Place.read_table
        patch.setattr(Place, "read_table", lambda self: reads.update([self.url]) or read(self))
        progress = list[int]()
        old = parts_in(place.at("old"), rows)
        made = reorder(old, order, StageOutput(place.at("new"), progress.append), per_part)
        assert not reads or max(reads.values()) == 1 or len(Plan.of(rows, order, per_part).old) == 1
        assert [part.rows for part in made] == [min(per_part, len(order) - at) for at in range(0, len(order), per_part)]
        expected = table_of(range(total)).take(pa.array(order))
        for part, start in zip(made, itertools.count(0, per_part), strict=False):
            assert part.table().equals(expected.slice(start, per_part)) and not part.table().schema.metadata
        assert sum(progress) == len(order)
        assert place.names() == ["new", "old"], "what lay between is gone"


@given(sizes, st.integers(1, 7), st.integers(1, 6), st.integers(1, 8))
def test_groups_are_few_and_small(rows, per_part, groups, group_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reordering, "GROUPS", groups)
        patch.setattr(reordering, "GROUP_ROWS", group_rows)
        plan = Plan.of(rows, np.arange(sum(rows)), per_part)
    size = max(group_rows, -(-sum(rows) // groups))
    assert len(plan.old) <= groups and len(plan.new) <= groups
    assert all(sum(rows[span]) <= size + max(rows) for span in plan.old)
    assert all(sum(plan.new_rows[span]) < size + per_part for span in plan.new)
    assert sum(sum(rows[span]) for span in plan.old) == sum(sum(plan.new_rows[span]) for span in plan.new) == sum(rows)


def test_pieces_grow_with_the_rows_and_not_with_their_square():
    for pairs in (10_000, 100_000, 1_000_000, 10_000_000):
        plan = Plan.of([512] * (pairs // 512), np.arange(pairs // 512 * 512), 512)
        assert len(plan.old) * len(plan.new) <= reordering.GROUPS**2 <= 2**14


def test_only_groups_that_are_missing_are_made_again(monkeypatch):
    monkeypatch.setattr(reordering, "GROUP_ROWS", 4)
    with folder() as place:
        old, order = parts_in(place.at("old"), [4] * 6), np.random.default_rng(0).permutation(24)
        made = reorder(old, order, StageOutput(place.at("new")), 2)
        before = ids(made)
        made[3].place.remove()
        left = {part.place.url: part.place.read() for part in made if part.place.exists()}
        writes, write = list[str](), Place.write
        monkeypatch.setattr(Place, "write", lambda self, content: writes.append(self.url) or write(self, content))
        again = reorder(old, order, StageOutput(place.at("new")), 2)
        assert ids(again) == before
        assert {url for url in writes if "pieces" not in url} == {part.place.url for part in made[2:4]}
        assert all(Place(url).read() == content for url, content in left.items())
        writes.clear()
        reorder(old, order, StageOutput(place.at("new")), 2)
        assert not writes


def test_no_more_is_begun_once_there_is_enough(monkeypatch):
    monkeypatch.setattr(reordering, "GROUP_ROWS", 4)
    with folder() as place:
        old = parts_in(place.at("old"), [4] * 6)
        for calls in (0, 3, 9):
            left = itertools.count(calls, -1)
            reorder(old, np.arange(24), StageOutput(place.at("new"), enough=lambda: next(left) <= 0), 2)  # noqa: B023
            assert "old.pieces" not in place.names() and "new.pieces" not in place.names()
        assert len(place.at("new").names()) < 12


def test_a_part_that_cannot_be_read_is_an_error():
    with folder() as place:
        old = parts_in(place.at("old"), [4, 4])
        old[1].place.remove()
        with pytest.raises(FileNotFoundError):
            reorder(old, np.arange(8), StageOutput(place.at("new")), 2)


def round_of(place: Place, index: int, split: bool, batch: int, feedback: bool) -> Round:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": place.at("run").url, "seed": 5}}
    tree |= {"rounds": {"count": 3, "data": "split" if split else "all"}, "optim": {"batch_size": batch}}
    run = create_run(load_config(tree))
    for earlier in range(index):
        run.round(earlier).committed = True
    return Round(run, index, Notes())


@examples
@given(sizes, sizes | st.just([]), st.integers(0, 2), st.booleans(), st.integers(1, 5))
def test_the_pairs_of_a_round_have_the_order_of_its_streams(rows, votes, index, split, batch):
    with folder() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reordering, "GROUP_ROWS", 5)
        patch.setattr(stages, "PART_PAIRS", 4)
        total, more = sum(rows), sum(votes)
        order = Stream.PAIR_ORDER.generator(seed=5, round=index).permutation(total)
        if split:
            order = np.array_split(Stream.SPLIT.generator(seed=5).permutation(total), 3)[index]
        if more:
            both = np.concatenate([order, np.arange(total, total + more)])
            order = Stream.FEEDBACK_ORDER.generator(seed=5, round=index).permutation(both)
        round = round_of(place, index, split, batch, bool(votes))
        source, voted = parts_in(place.at("data"), rows), parts_in(place.at("votes"), votes, total)
        if not len(order):
            return
        assert ids(round.pairs(source, voted)) == order.tolist()
        assert ids(round.pairs(source, voted)) == order.tolist(), "looked up"


@given(sizes)
@examples
def test_lengths_are_those_of_the_pairs(rows):
    with folder() as place:
        found = stages.lengths(parts_in(place, rows))
    assert found.dtype == np.int32
    assert found.tolist() == [[row % 3 + n for n in (1, 2, 3)] for row in range(sum(rows))]


def test_a_round_without_pairs_is_refused():
    with folder() as place, pytest.raises(StageError, match="no preference pairs"):
        round_of(place, 0, False, 2, False).pairs([])
