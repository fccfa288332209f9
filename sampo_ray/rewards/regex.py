"""Whether a completion has what a regular expression looks for."""

from collections.abc import Sequence

import regex  # unlike `re` it lets other threads run, and ends in time

from sampo_ray.errors import RewardError

LIMIT_S = 1.0
"""For one completion; a pattern may need more time than there is."""


def reward(completions: Sequence[str], pattern: str) -> list[float | None]:
    """1 for a completion in which `pattern` is found, else 0; None where it cannot be told within LIMIT_S.

    The pattern is found anywhere: `^` and `$` are begin and end of the completion, `(?s)` lets `.` match line breaks,
    `(?i)` ignores case. `^(?s:<think>.+</think>.+)$` asks for a form.
    """
    try:
        compiled = regex.compile(pattern)
    except (regex.error, TypeError, ValueError) as error:
        raise RewardError(f"pattern={pattern!r} is no regular expression ({error}); correct it") from None
    return [_found(compiled, text) for text in completions]


def _found(pattern: "regex.Pattern[str]", text: str) -> float | None:
    try:
        return float(pattern.search(text, timeout=LIMIT_S, concurrent=True) is not None)
    except TimeoutError:
        return None
