"""The share of a prompt's instructions that an answer follows, verified by lm-evaluation-harness' task ifeval; those of
IFBench by the package ifbench, where that is installed."""

import functools
import logging
from collections.abc import Mapping, Sequence

from sampo_ray.errors import RewardError
from sampo_ray.rewards.apart import Apart, EndedError
from sampo_ray.sources.messages import Message

logger = logging.getLogger(__name__)


def reward(
    completions: Sequence[str],
    prompts: Sequence[list[Message]],
    instruction_id_list: Sequence[list[str] | None],
    kwargs: Sequence[list[dict[str, object]] | None],
    strict: bool = True,
) -> list[float | None]:
    """From 0 to 1: the share of instructions that a completion follows, as the harness verifies them.

    `instruction_id_list` and `kwargs` are columns in the format of IFEval's own data: the instructions' names, as in
    `length_constraints:number_words`, and for each its values, as in `{"relation": "at least", "num_words": 300}`.
    `strict: false` is the harness' loose reading, which also tries the answer without its first or last line, and
    without `*`. None for a row that has no instructions, whose instructions cannot be verified (unknown, or with a
    value missing), or that takes longer than the limit of `apart`.
    """
    rows = zip(completions, prompts, instruction_id_list, kwargs, strict=True)
    return [_share(followed(ids, values, prompt[-1]["content"], text, strict)) for text, prompt, ids, values in rows]


def followed(
    ids: Sequence[str] | None,
    values: Sequence[Mapping[str, object]] | None,
    prompt: str,
    text: str,
    strict: bool = True,
) -> list[bool] | None:
    """Which of a prompt's instructions an answer follows; None where that cannot be told. RewardError where the
    verifiers are not installed."""
    if not ids or values is None:
        return None
    try:
        result = _verifiers()([list(ids), list(values), prompt, text, strict])
    except EndedError:
        logger.warning("instructions of an answer could not be verified in time")
        return None
    if isinstance(result, str):
        raise RewardError(result)
    if isinstance(result, dict):
        _warn_of(result["unknown"])
        return None
    return result if isinstance(result, list) else None


def _share(follows: Sequence[bool] | None) -> float | None:
    return None if follows is None else sum(follows) / len(follows)


@functools.cache
def _warn_of(unknown: str) -> None:
    logger.warning("instructions that cannot be verified have no reward: %s", unknown)


@functools.cache
def _verifiers() -> Apart:
    return Apart("sampo_ray.rewards.ifeval_verifiers")
