"""Planning: every pair once an epoch, rows within budget, the same rows whatever the world size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.batching import ROW_MULTIPLE, assemble, lengths_of, plan_round, steps_in_round
from tests.conftest import random_pairs

plans = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 16),
        "tokens_per_row": st.integers(16, 400),
        "world": st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "round": st.integers(0, 3),
    }
)
lengths = st.lists(st.tuples(*[st.integers(1, 90)] * 3), min_size=1, max_size=40).map(np.array)


@given(lengths, plans)
def test_every_epoch_holds_every_pair_once(lengths, plan):
    steps = list(plan_round(lengths, **plan))
    assert len(steps) == steps_in_round(len(lengths), plan["batch_size"], plan["epochs"])
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    for epoch in range(plan["epochs"]):
        seen = [i for s in steps if s.epoch == epoch for rank in s.rows for row in rank for i in row]
        assert sorted(seen) == list(range(len(lengths)))


@given(lengths, plans)
def test_rows_keep_to_their_budget_and_ranks_have_equal_counts(lengths, plan):
    for step in plan_round(lengths, **plan):
        assert len({len(rank) for rank in step.rows}) == 1
        assert step.pairs == sum(len(row) for rank in step.rows for row in rank) <= plan["batch_size"]
        for row in (row for rank in step.rows for row in rank):
            assert len(row) <= 1 or lengths[row].sum() <= plan["tokens_per_row"]


@given(lengths, plans)
def test_rows_do_not_depend_on_the_world_size(lengths, plan):
    def rows(world):
        return [
            sorted(tuple(row) for rank in step.rows for row in rank if len(row))
            for step in plan_round(lengths, **plan | {"world": world})
        ]

    assert rows(1) == rows(3)


@given(st.integers(1, 12), st.integers(0, 50))
def test_a_row_lays_pairs_end_to_end_with_positions_that_restart(count, seed):
    pairs = random_pairs(count, seed)
    row = assemble(pairs)
    assert len(row.tokens) % ROW_MULTIPLE == 0
    assert lengths_of(pairs).tolist() == [[s.prompt, s.chosen, s.rejected] for s in row.segments]
    for segment, pair in zip(row.segments, pairs.to_pylist(), strict=True):
        tokens, positions = row.tokens.tolist(), row.positions.tolist()
        assert tokens[segment.start : segment.end] == pair["prompt"] + pair["chosen"] + pair["rejected"]
        assert positions[segment.start : segment.rejected_start] == list(range(segment.prompt + segment.chosen))
        assert positions[segment.rejected_start] == segment.prompt
        states = segment.rejected_states(np.arange(segment.rejected))
        assert states[0] == segment.chosen_states(np.arange(1))[0] == segment.chosen_start - 1
        assert (states[1:] == segment.rejected_start + np.arange(segment.rejected - 1)).all()
