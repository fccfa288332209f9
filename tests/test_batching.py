"""Planning: every pair once an epoch, rows within budget, filled evenly."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.rows import RowBudget
from sampo_ray.training.batching import (
    ROW_MULTIPLE,
    assemble,
    lengths_of,
    plan_round,
    plan_rows,
    predecessors,
    steps_in_round,
)
from tests.conftest import random_pairs

budgets = st.builds(RowBudget, st.integers(1, 16), st.integers(16, 400), st.integers(1, 4))
lengths = st.lists(st.tuples(*[st.integers(1, 90)] * 3), min_size=1, max_size=40).map(np.array)


@given(lengths, budgets, st.integers(1, 3), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_every_pair_once(lengths, budget, epochs, seed, round):
    steps = list(plan_round(lengths, budget, epochs=epochs, seed=seed, round=round))
    assert len(steps) == steps_in_round(len(lengths), budget.batch_size, epochs)
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    for epoch in range(epochs):
        seen = [i for s in steps if s.epoch == epoch for rank in s.rows for row in rank for i in row]
        assert sorted(seen) == list(range(len(lengths)))


@given(lengths, budgets)
def test_rows_keep_to_their_budget_and_ranks_have_equal_counts(lengths, budget):
    for step in plan_round(lengths, budget, epochs=1, seed=0, round=0):
        assert len(step.rows) == budget.world and len({len(rank) for rank in step.rows}) == 1
        assert step.pairs == sum(len(row) for rank in step.rows for row in rank) <= budget.batch_size
        for row in (row for rank in step.rows for row in rank):
            assert len(row) <= 1 or lengths[row].sum() <= budget.tokens_per_row


@given(lengths, budgets)
def test_the_reference_sees_the_rows_that_the_ranks_will(lengths, budget):
    for step in plan_round(lengths, budget, epochs=1, seed=0, round=0):
        batch = np.arange((step.index - 1) * budget.batch_size, min(step.index * budget.batch_size, len(lengths)))
        dealt = [
            step.rows[i % budget.world][i // budget.world].tolist()
            for i in range(len(plan_rows(batch, lengths, budget)))
        ]
        assert dealt == [row.tolist() for row in plan_rows(batch, lengths, budget)]


@given(lengths, budgets)
def test_the_set_of_pairs_of_a_step_does_not_depend_on_the_world_size(lengths, budget):
    def pairs(world):
        plan = plan_round(lengths, replace(budget, world=world), epochs=2, seed=0, round=0)
        return [sorted(i for rank in step.rows for row in rank for i in row) for step in plan]

    assert pairs(1) == pairs(3)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_hardly_a_token_slot_is_paid_for_in_vain(world, tokens):
    """Lengths like UltraFeedback's, cut to 1,024 tokens a response."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal([4.3, 5.4, 5.3], 0.8, (1024, 3))).astype(np.int64) + 1, 1024)
    useful = paid = 0
    for step in plan_round(lengths, RowBudget(128, tokens, world), epochs=1, seed=0, round=0):
        used = np.array([[lengths[row].sum() for row in rank] for rank in step.rows])
        filled = np.maximum(-(-used // ROW_MULTIPLE) * ROW_MULTIPLE, ROW_MULTIPLE)
        useful += used.sum()
        paid += filled.max(axis=0).sum() * world  # all wait for the slowest
    assert useful / paid > 0.97


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
def test_a_row_lays_pairs_end_to_end_each_prompt_once_and_each_token_where_its_text_has_it(count, prompts, seed):
    pairs = random_pairs(count, seed, prompts=prompts)
    row = assemble(pairs)
    tokens, positions = row.tokens.tolist(), row.positions.tolist()
    before = predecessors(row.segments, len(tokens)).tolist()
    assert len(tokens) % ROW_MULTIPLE == 0
    assert lengths_of(pairs).tolist() == [[s.prompt, s.chosen, s.rejected] for s in row.segments]
    used = 0
    for at, pair in zip(row.segments, pairs, strict=True):
        assert at.shares_prompt == (at.prompt_start < used)
        used += at.chosen + at.rejected + (0 if at.shares_prompt else at.prompt)
        prompt = slice(at.prompt_start, at.prompt_start + at.prompt)
        assert (tokens[prompt], positions[prompt]) == (pair.prompt.tolist(), list(range(at.prompt)))
        assert tokens[at.chosen_start : at.end] == [*pair.chosen, *pair.rejected]
        for start, length in ((at.chosen_start, at.chosen), (at.rejected_start, at.rejected)):
            assert positions[start : start + length] == list(range(at.prompt, at.prompt + length))
            assert before[start : start + length] == [prompt.stop - 1, *range(start, start + length - 1)]
    assert used == row.segments[-1].end and not any(tokens[used:])
    distinct = {tuple(pair.prompt) for pair in pairs}
    assert sum(not at.shares_prompt for at in row.segments) == len(distinct)
