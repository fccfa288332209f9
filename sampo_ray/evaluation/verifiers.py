"""Verifiable instructions in the format of IFEval and IFBench: which of them an answer follows."""

from collections.abc import Mapping, Sequence
from typing import cast

import pyarrow as pa

from sampo_ray.data.rewards import Samples
from sampo_ray.rewards import ifeval


def followed(names: object, values: object, prompt: str, answer: str) -> tuple[bool, ...] | None:
    """Which of a prompt's instructions an answer follows: `names` and `values` are what its row has in the columns
    `instruction_id_list` and `kwargs`. None where it has none, or they cannot be verified. RewardError where the
    verifiers are not installed."""
    if not isinstance(names, list) or not isinstance(values, list) or not names:
        return None
    found = ifeval.followed(cast(Sequence[str], names), cast(Sequence[Mapping[str, object]], values), prompt, answer)
    return None if found is None else tuple(found)


def followed_in(completions: pa.Table) -> list[tuple[bool, ...] | None]:
    """`followed` for each row of a COMPLETIONS block."""
    samples = Samples.of(completions)
    nothing: list[object] = [None] * len(samples.completions)
    names, values = (samples.columns.get(name, nothing) for name in ("instruction_id_list", "kwargs"))
    questions = [prompt[-1]["content"] for prompt in samples.prompts]
    return [followed(*row) for row in zip(names, values, questions, samples.completions, strict=True)]
