"""Rewards that are corrected for length: what goes, what stays, and what the fit says of it."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.data.length_control import Moments, fit, moments_of, without_length
from sampo_ray.data.length_fit import LengthFit
from sampo_ray.data.preferences import SCORES, best_against_worst


def block(rewards: np.ndarray, tokens: np.ndarray, finish: str = "stop", name: str = "p") -> pa.Table:
    """SCORES of [prompts, samples] rewards (NaN: none) and tokens."""
    prompts, samples = rewards.shape
    n = prompts * samples
    columns = {
        "id": [f"{name}{i}" for i in range(prompts) for _ in range(samples)],
        "messages": ["[]"] * n,
        "columns": ["{}"] * n,
        "prompt": [[1]] * n,
        "sample": [j for _ in range(prompts) for j in range(samples)],
        "completion": [[7] * int(t) for t in tokens.ravel()],
        "text": [f"text {i}" for i in range(n)],
        "finish_reason": [finish] * n,
        "logprobs": [[0.0] * int(t) for t in tokens.ravel()],
        "first_version": [0] * n,
        "last_version": [0] * n,
        "reward": [None if np.isnan(r) else r for r in rewards.ravel()],
    }
    return pa.table(columns, schema=SCORES)


def corrected(*blocks: pa.Table) -> tuple[LengthFit, list[pa.Table]]:
    found = fit(sum((moments_of(each) for each in blocks), Moments()))
    assert found is not None
    return found, [without_length(each, found) for each in blocks]


def random(seed: int, prompts: int = 12, samples: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(prompts, samples)), rng.integers(1, 60, (prompts, samples)).astype(float)


@given(st.integers(0, 200), st.floats(-3, 3).filter(lambda b: abs(b) > 1e-3))
def test_a_reward_that_is_length_alone_becomes_none(seed: int, slope: float) -> None:
    _, tokens = random(seed)
    found, [left] = corrected(block(slope * tokens + np.arange(12)[:, None], tokens))
    assert found.slope == pytest.approx(slope) and found.r2 == pytest.approx(1)
    pairs, dropped = best_against_worst(left)
    assert pairs.num_rows == 0 and dropped == {"tie": 12}


@given(st.integers(0, 200))
def test_a_reward_without_anything_of_length_in_it_keeps_all_its_pairs(seed: int) -> None:
    rewards, tokens = random(seed)
    x, y = (values - values.mean(1, keepdims=True) for values in (tokens, rewards))
    rewards -= (x * y).sum() / (x * x).sum() * x
    scores = block(rewards, tokens)
    found, [left] = corrected(scores)
    assert found.slope == pytest.approx(0, abs=1e-9) and found.r2 == pytest.approx(0, abs=1e-9)
    assert left["reward"].to_pylist() == pytest.approx(scores["reward"].to_pylist(), abs=1e-6)
    before, after = best_against_worst(scores)[0], best_against_worst(left)[0]
    assert before.drop(["chosen_reward", "rejected_reward"]) == after.drop(["chosen_reward", "rejected_reward"])


@given(st.integers(0, 100), st.floats(-100, 100))
def test_what_a_prompt_adds_to_all_its_rewards_changes_no_fit_and_no_pair(seed: int, shift: float) -> None:
    rewards, tokens = random(seed)
    shifts = shift * np.arange(12)[:, None]
    (found, [left]), (moved, [left_moved]) = (
        corrected(block(rewards, tokens)),
        corrected(block(rewards + shifts, tokens)),
    )
    assert moved.slope == pytest.approx(found.slope, abs=1e-8) and moved.r2 == pytest.approx(found.r2, abs=1e-6)
    assert best_against_worst(left)[0]["id"] == best_against_worst(left_moved)[0]["id"]


def test_the_fit_is_ordinary_least_squares_with_a_mean_for_each_prompt() -> None:
    rewards, tokens = random(5)
    found, _ = corrected(block(rewards[:7], tokens[:7]), block(rewards[7:], tokens[7:], name="q"))
    dummies = np.kron(np.eye(12), np.ones((4, 1)))
    design = np.column_stack([tokens.ravel(), dummies])
    solution, rest, *_ = np.linalg.lstsq(design, rewards.ravel(), rcond=None)
    variance = rest[0] / (48 - 13) * np.linalg.inv(design.T @ design)[0, 0]
    assert (found.slope, found.stderr) == (pytest.approx(solution[0]), pytest.approx(variance**0.5))
    assert (found.completions, found.prompts) == (48, 12)


def test_difficulty_of_prompts_is_no_effect_of_length() -> None:
    _, tokens = random(1)
    hard = np.arange(12)[:, None]  # the harder, the longer all answers are, and the worse
    found, _ = corrected(block(0.01 * tokens - 50.0 * hard, tokens + 100 * hard))
    assert found.slope == pytest.approx(0.01)


def test_cut_completions_and_those_without_a_reward_do_not_count_for_the_fit() -> None:
    rewards, tokens = random(3)
    missing = rewards.copy()
    missing[0, 1] = np.nan
    alone, _ = corrected(block(rewards[1:], tokens[1:]))
    with_cut, _ = corrected(block(rewards[1:], tokens[1:]), block(rewards, tokens + 500, finish="length", name="q"))
    assert with_cut == alone
    found, [left] = corrected(block(missing, tokens))
    assert found.completions == 47 and left["reward"].null_count == 1


def test_nothing_is_fitted_where_nothing_can_be_told() -> None:
    ones = np.ones((3, 4))
    assert fit(moments_of(block(np.arange(12.0).reshape(3, 4), ones))) is None  # of one length
    assert fit(moments_of(block(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]])))) is None  # two points are a line
    assert fit(moments_of(block(np.ones((4, 1)), np.ones((4, 1))))) is None
    assert fit(moments_of(block(np.ones((0, 4)), np.ones((0, 4))))) is None
