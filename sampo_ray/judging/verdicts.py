"""Reads verdicts out of what a judge answered. What is not plainly a verdict is none."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

_WRAPPED = re.compile(r"[\s*_`\"'().\[\]{}:]*")
_REFUSALS = re.compile(
    r"(i'?m sorry|i am sorry|sorry|i can(no|')t|i am unable|i'?m unable|as an ai|i won'?t)\b", re.IGNORECASE
)


class Reply(BaseModel):
    """A judge's answer as far as verdicts are read from it. `top`: log-probs (nats) of the likeliest first tokens;
    None where the endpoint gives none."""

    model_config = ConfigDict(frozen=True)

    text: str
    finish_reason: str | None = None
    refused: bool = False
    top: Mapping[str, float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoVerdict(Exception):
    """An answer that is no verdict, and of which kind."""

    def __init__(self, kind: Literal["refused", "nonsense"]) -> None:
        super().__init__(kind)
        self.kind = kind


def weights_of(reply: Reply, labels: Sequence[str], weighted: bool) -> list[float]:
    """[labels], adding up to 1: the probability of each label among them, or 1 for the one that was answered.

    The answer itself must be a label in either case: a judge that begins to say something else gave no verdict, even
    though some label has a log-prob. Raises NoVerdict.
    """
    if reply.refused or reply.finish_reason == "content_filter":
        raise NoVerdict("refused")
    said = bare(reply.text)
    if said not in labels:
        raise NoVerdict("refused" if _REFUSALS.match(reply.text.strip()) else "nonsense")
    if not weighted:
        return [float(label == said) for label in labels]
    masses = dict.fromkeys(labels, 0.0)
    for token, logprob in (reply.top or {}).items():
        if token.strip() in masses:  # "A" and " A" are one verdict
            masses[token.strip()] += math.exp(min(logprob, 0.0))
    total = sum(masses.values())
    if not total > 0.0:
        raise NoVerdict("nonsense")
    return [mass / total for mass in masses.values()]


def bare(text: str) -> str:
    """An answer without spaces, quotes, brackets and emphasis around it."""
    begin, end = _WRAPPED.match(text), _WRAPPED.match(text[::-1])
    assert begin is not None and end is not None
    return text[begin.end() : max(len(text) - end.end(), begin.end())]
