"""Rewards without what the lengths of completions explain of them.

Over a round, `reward = a_prompt + slope * tokens + rest` is fitted by least squares within prompts (Frisch-Waugh: both
sides lose their mean over a prompt's completions), so that hard prompts, whose answers are longer and worse, do not
pose as an effect of length. A corrected reward is `reward - slope * (tokens - the prompt's mean)`. AlpacaEval 2 does
likewise to win rates, with a logistic model (Dubois et al. 2024, arXiv 2404.04475).
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sampo_ray.data.length_fit import LengthFit

TIE = 1e-9
"""Corrected rewards that differ by less than this share of a round's spread are equal: the rest is rounding."""


@dataclass(frozen=True)
class Moments:
    """Sums over completions, within prompts; they add up over blocks. `x`: tokens, `y`: rewards."""

    completions: int = 0
    prompts: int = 0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def moments_of(scores: pa.Table) -> Moments:
    """Of a SCORES block: completions with a reward that ended by themselves, of prompts that have two or more. The
    length of one that was cut is the limit's, not its own."""
    prompts, tokens, rewards = _columns(scores)
    finished = np.array(scores["finish_reason"].to_pylist()) == "stop"
    kept = np.isfinite(rewards) & finished
    _, groups, sizes = np.unique(prompts[kept], return_inverse=True, return_counts=True)
    several = sizes[groups] > 1
    groups, x, y = groups[several], tokens[kept][several], rewards[kept][several]
    x, y = _within(groups, x), _within(groups, y)
    return Moments(len(x), int((sizes > 1).sum()), float(x @ x), float(x @ y), float(y @ y))


def fit(moments: Moments) -> LengthFit | None:
    """None where nothing can be told: lengths are equal, or there are too few completions."""
    free = moments.completions - moments.prompts - 1
    if free < 1 or moments.xx <= 0.0:
        return None
    slope = moments.xy / moments.xx
    rest = max(moments.yy - slope * moments.xy, 0.0)
    return LengthFit(
        slope=slope,
        stderr=math.sqrt(rest / free / moments.xx),
        r2=1.0 - rest / moments.yy if moments.yy > 0.0 else 0.0,
        spread=math.sqrt(moments.yy / (free + 1)),
        completions=moments.completions,
        prompts=moments.prompts,
    )


def without_length(scores: pa.Table, found: LengthFit) -> pa.Table:
    """A SCORES block with corrected rewards: each keeps its prompt's mean."""
    prompts, tokens, rewards = _columns(scores)
    scored = np.isfinite(rewards)
    _, groups = np.unique(prompts[scored], return_inverse=True)
    x, y = tokens[scored], rewards[scored]
    rest = _within(groups, y) - found.slope * _within(groups, x)
    if (step := TIE * found.spread) > 0.0:
        rest = np.round(rest / step) * step
    corrected = rewards.copy()
    corrected[scored] = _means(groups, y) + rest
    values = pa.array(corrected, pa.float64(), mask=~scored)
    return scores.set_column(scores.schema.get_field_index("reward"), scores.schema.field("reward"), values)


def _columns(scores: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts' ids, tokens and rewards (NaN: none), each [completions]."""
    lengths = pc.list_value_length(scores["completion"]).to_numpy().astype(np.float64)
    rewards = scores["reward"].cast(pa.float64()).to_numpy().astype(np.float64)
    return np.array(scores["id"].to_pylist(), dtype=object), lengths, rewards


def _means(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each value's group."""
    if not len(values):
        return values
    means: np.ndarray = np.bincount(groups, values) / np.bincount(groups)
    return np.asarray(means[groups])


def _within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values without the mean of their group."""
    within: np.ndarray = values - _means(groups, values)
    return within
