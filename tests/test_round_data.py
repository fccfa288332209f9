"""What a rank reads of a round: the pairs of its own rows, a few steps ahead, from parts in the order of each epoch."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.actors.ranks import round_data
from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.ranks.round_data import StepPairs, read_ahead
from sampo_ray.config.run import load_config
from sampo_ray.loop import epochs, reorder
from sampo_ray.loop.epochs import LaterEpochs
from sampo_ray.run.parts import Part
from sampo_ray.run.storage import Place
from sampo_ray.training.batching import Step, has_parts_of_its_own, plan_round, steps_in_round
from tests.in_process import in_process  # noqa: F401
from tests.test_reorder import examples, folder, parts_in
from tests.waiting import scaled, wait_until

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_data, "PAIRS_S", scaled(20))
    monkeypatch.setattr(round_data, "LOOK_EVERY_S", 0.01)


def spec_of(place: Place, pairs: int, batch: int, epochs: int, per_part: int, in_order: bool) -> RoundSpec:
    """A round of pairs as `Round.pairs` leaves them: in parts of whole batches."""
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": place.url, "seed": 3}}
    tree |= {"rounds": {"epochs": epochs}, "optim": {"batch_size": batch}, "reference": {"where": "workers"}}
    rows = [min(per_part * batch, pairs - at) for at in range(0, pairs, per_part * batch)]
    parts = tuple(parts_in(place.at("stored"), rows))
    steps = steps_in_round(pairs, batch, epochs)
    return RoundSpec("r", place, load_config(tree), 1, 0, steps, parts, cast(Any, None), in_order)


def plan_of(spec: RoundSpec, world: int, after: int = 0) -> list[Step]:
    lengths = np.array([[row % 3 + n for n in (1, 2, 3)] for row in range(sum(part.rows for part in spec.parts))])
    budget = replace(spec.config.row_budget, world=world, tokens_per_row=24)
    return list(plan_round(lengths, budget, epochs=spec.config.rounds.epochs, seed=3, round=1, after=after))


@examples
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.data(),
)
def test_each_rank_gets_the_pairs_of_its_rows_from_whichever_parts_they_lie_in(
    pairs, batch, epochs, per_part, world, in_order, data
):
    with folder() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reorder, "GROUP_ROWS", 7)
        spec = spec_of(place, pairs, batch, epochs, per_part, in_order)
        after = data.draw(st.integers(0, spec.steps))
        with LaterEpochs(spec) as later:
            for step in range(1, spec.steps + 1):
                later.reached(step, 0)
            await_work(later)
        plan = plan_of(spec, world, after)
        assert [step.index for step in plan] == list(range(after + 1, spec.steps + 1))
        for rank in range(world):
            reader = StepPairs(spec, rank)
            for step, found in read_ahead(iter(plan), reader.of):
                mine = [int(index) for row in step.rows[rank] for index in row]
                assert {index: pair.id for index, pair in found.items()} == {i: f"pair-{i}" for i in mine}
                assert all(pair.prompt.tolist() == [i] * (i % 3 + 1) for i, pair in found.items())
                assert all(pair.rejected.tolist() == [i] * (i % 3 + 3) for i, pair in found.items())
        assert has_later(spec) == (list(range(1, epochs)) if in_order else [])


def await_work(later: LaterEpochs) -> None:
    wait_until(lambda: not later.check() and not later._work, "later epochs", every=0.001)


def has_later(spec: RoundSpec) -> list[int]:
    return [int(name) for name in spec.epochs.names()]


def reading(spec: RoundSpec, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read, seen = Part.table, list[str]()
    monkeypatch.setattr(Part, "table", lambda self: seen.append(self.place.url) or read(self))
    return seen


@pytest.mark.parametrize("in_order", [False, True])
def test_each_part_is_read_once_an_epoch_or_held(monkeypatch, in_order):
    with folder() as place:
        spec = spec_of(place, 40, 4, epochs=3, per_part=2, in_order=in_order)
        with LaterEpochs(spec) as later:
            later.reached(spec.steps, 0)
            await_work(later)
        seen = reading(spec, monkeypatch)
        reader, at, places = StepPairs(spec, 0), Place.at, list[Place]()
        monkeypatch.setattr(Place, "at", lambda self, *names: places.append(self) or at(self, *names))
        for step in plan_of(spec, world=2):
            reader.of(step)
        assert len(seen) == len(set(seen)) == len(spec.parts) * (3 if in_order else 1)
        assert len(places) <= 3 * len(seen), "a part takes as long however many there are"
        info = reader._table.cache_info()
        assert info.maxsize == (2 if in_order else len(spec.parts))
        reader.close()
        assert reader._table.cache_info().currsize == 0


def test_a_rank_that_goes_on_reads_nothing_of_the_steps_before(monkeypatch):
    with folder() as place:
        spec = spec_of(place, 40, 4, epochs=2, per_part=2, in_order=True)
        with LaterEpochs(spec) as later:
            later.resume(done=17, oldest=16)
            await_work(later)
        seen = reading(spec, monkeypatch)
        for step in plan_of(spec, world=1, after=17):
            StepPairs(spec, 0).of(step)
        assert {url.rpartition("/")[2] for url in seen} == {"part-00003.parquet", "part-00004.parquet"}
        assert all("epochs/1" in url for url in seen)


def steps(count: int) -> list[Step]:
    return [Step(index + 1, 0, index, np.array([index]), ((np.array([index]),),)) for index in range(count)]


def test_a_bounded_number_of_steps_is_read_ahead():
    read = list[int]()
    for number, (step, _) in enumerate(
        read_ahead(iter(steps(50)), lambda step: read.append(step.index) or {}, ahead=3)
    ):
        assert step.index == number + 1
        wait_until(lambda: len(read) == min(50, number + 1 + 3), "steps ahead", every=0.001)  # noqa: B023


def test_an_error_of_the_reader_is_that_of_its_step():
    def read(step: Step) -> dict:
        if step.index == 3:
            raise OSError("the disk is gone")
        return {}

    taken = []
    with pytest.raises(OSError, match="the disk is gone"):
        for step, _ in read_ahead(iter(steps(9)), read):
            taken.append(step.index)
    assert taken == [1, 2]


def test_pairs_that_do_not_come_are_an_error_and_nobody_waits_for_them_any_longer(monkeypatch):
    monkeypatch.setattr(round_data, "PAIRS_S", 0.05)
    with folder() as place:
        spec = spec_of(place, 8, 4, epochs=2, per_part=1, in_order=True)
        reader = StepPairs(spec, 0)
        with pytest.raises(TimeoutError, match="pairs of the next step"):
            for _ in read_ahead(iter(plan_of(spec, world=1)), reader.of):
                pass
        reader.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("pairs")], "end of the thread")


def test_an_epoch_is_waited_for_until_its_parts_are_there():
    with folder() as place:
        spec = spec_of(place, 8, 4, epochs=2, per_part=1, in_order=True)
        found = []
        with LaterEpochs(spec) as later:
            for step, pairs in read_ahead(iter(plan_of(spec, world=1)), StepPairs(spec, 0).of):
                if step.index == 2:
                    assert has_later(spec) == []
                    later.reached(1, 0)
                found += pairs
        assert Counter(found) == Counter([*range(8)] * 2)


def test_epochs_are_made_one_ahead_and_removed_once_no_rank_can_go_back_to_them():
    with folder() as place:
        spec = spec_of(place, 8, 2, epochs=5, per_part=2, in_order=True)  # four steps an epoch
        seen = list[list[int]]()
        with LaterEpochs(spec) as later:
            later.resume(0, 0)
            for step in range(1, spec.steps + 1):
                later.reached(step, max(0, step - 3) // 2 * 2)  # a checkpoint every second step, of which two are kept
                await_work(later)
                seen.append(has_later(spec))
        assert seen[0] == [1] and seen[3] == [1] and seen[4] == [1, 2] and seen[-1] == [4]
        assert max(map(len, seen)) <= 3
        for step, there in enumerate(seen, start=1):
            back = max(0, step - 3) // 2 * 2
            assert set(range(max(1, back // 4), min(5, (step - 1) // 4 + 2))) <= set(there)


def test_a_resumed_run_makes_what_its_ranks_may_begin_with_and_keeps_what_is_there():
    with folder() as place:
        spec = spec_of(place, 8, 2, epochs=5, per_part=2, in_order=True)
        with LaterEpochs(spec) as later:
            later.reached(3, 0)
            await_work(later)
        before = spec.epoch_part(1, 0).place.read()
        with LaterEpochs(spec) as later:
            later.resume(done=9, oldest=7)
            await_work(later)
        assert has_later(spec) == [1, 2] and spec.epoch_part(1, 0).place.read() == before


def test_an_epoch_that_cannot_be_made_is_told_where_results_are_waited_for(monkeypatch):
    def fails(*_: object) -> Sequence[Part]:
        raise OSError("no space left on device")

    monkeypatch.setattr(epochs, "reorder", fails)
    with folder() as place:
        spec = spec_of(place, 8, 2, epochs=2, per_part=2, in_order=True)
        with LaterEpochs(spec) as later, pytest.raises(OSError, match="no space"):
            later.reached(1, 0)
            until = time.monotonic() + scaled(10)
            while time.monotonic() < until:
                later.check()


def test_a_round_whose_pairs_are_held_gets_no_parts_for_later_epochs():
    few, many = (np.full((pairs, 3), 64, np.int32) for pairs in (20_000, 30_000))
    assert [has_parts_of_its_own(each, 2) for each in (few, many)] == [False, True]
    assert not has_parts_of_its_own(many, 1)
    with folder() as place:
        spec = spec_of(place, 8, 2, epochs=5, per_part=2, in_order=False)
        with LaterEpochs(spec) as later:
            later.reached(7, 0)
        assert has_later(spec) == []
