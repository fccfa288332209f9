"""What a reward source scores, and what it may return. The sources: `reward_functions` and `reward_models`."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

import pyarrow as pa

from sampo_ray.errors import RewardError
from sampo_ray.sources.messages import Message

Rewards = list[float | None]


@dataclass(frozen=True)
class Samples:
    """Completions to be scored; all lists have one entry for each.

    `completion_ids` end in the end-of-turn token unless the completion was cut. `columns` are the prompt file's other
    columns, None where a row lacks one.
    """

    prompts: list[list[Message]]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[object]]

    @classmethod
    def of(cls, block: pa.Table) -> "Samples":
        """The samples of a COMPLETIONS block."""
        rows: list[dict[str, object]] = [json.loads(text) for text in block["columns"].to_pylist()]
        names = dict.fromkeys(name for row in rows for name in row)
        return cls(
            [json.loads(text) for text in block["messages"].to_pylist()],
            block["text"].to_pylist(),
            block["completion"].to_pylist(),
            {name: [row.get(name) for row in rows] for name in names},
        )


Scorer = Callable[[Samples], Rewards]
"""A loaded reward source. A reward is finite, or None where the source has none to give. Raises RewardError."""


def weighted_sum(rewards: Sequence[Rewards], weights: Sequence[float]) -> Rewards:
    """Of the rewards of several sources, each a list with one entry a sample; None where a source has none, or where
    the sum is not finite."""
    sums = [
        None if None in of_one else sum(weight * value for weight, value in zip(weights, of_one, strict=True) if value)
        for of_one in zip(*rewards, strict=True)
    ]
    return [None if each is None or not math.isfinite(each) else float(each) for each in sums]


def as_rewards(returned: object, samples: Samples) -> Rewards:
    """What a source returned as one reward a sample. Raises RewardError, quoting a prompt, where it is none."""
    prompts = samples.prompts
    try:
        if isinstance(returned, str | bytes | dict):
            raise TypeError
        values = list(cast(Iterable[SupportsFloat | None], returned))
    except TypeError:
        kind, prompt = type(returned).__name__, _quoted(prompts[0])
        raise RewardError(f"the reward source returned {kind} instead of a list of numbers for {prompt}") from None
    if len(values) != len(prompts):
        counts = f"{len(values)} scores for {len(prompts)} completions; return one score each."
        raise RewardError(f"the reward source returned {counts} The first completion answers {_quoted(prompts[0])}")
    return [_reward(value, prompt) for value, prompt in zip(values, prompts, strict=True)]


def _reward(value: SupportsFloat | None, prompt: list[Message]) -> float | None:
    if value is None:
        return None
    try:
        reward = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        reward = math.nan
    if math.isfinite(reward):
        return reward
    raise RewardError(
        f"the reward source returned {value!r} for a completion of {_quoted(prompt)}; return a finite number, or None "
        "where it has no score"
    )


def _quoted(prompt: list[Message]) -> str:
    text = " ".join(prompt[-1]["content"].split())
    return f"the prompt {text if len(text) <= 200 else text[:200] + '...'!r}"
