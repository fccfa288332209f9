"""How a conversation that is too long is cut: from its beginning, by whole turns, and only then within its question."""

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sampo_ray.sources.messages import Message

Length = Callable[[list[Message]], int | None]
"""How many tokens a conversation has; None where it cannot be written."""


class Shortened(NamedTuple):
    """What is left of a conversation: how many turns it lost, and how many characters its question lost in front."""

    messages: list[Message]
    lost_turns: int
    lost_characters: int


def shortened(
    messages: Sequence[Message], limit: int, length: Length, starts: Callable[[str], Sequence[int]]
) -> Shortened | None:
    """As much of a conversation, of more than `limit` tokens, as `length` says has at most that many; else None.

    The system turn stays. Of the others the oldest go, up to a turn of the user, so that no tool's result is without
    its call. Where the last question is too long with what follows it, the beginning of its text goes, up to one of the
    characters at which its tokens begin (`starts`).
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        return None

    def fits(kept: list[Message]) -> bool:
        return (tokens := length(kept)) is not None and tokens <= limit

    def of(question: int) -> list[Message]:
        return [*system, *messages[question:]]

    last = questions[-1]
    if fits(of(last)):
        # The fewer turns, the fewer tokens.
        first = questions[bisect_left(questions, True, 0, len(questions) - 1, key=lambda i: fits(of(i)))]
        return Shortened(of(first), first - len(system), 0)
    text = messages[last]["content"]
    begins = [begin for begin in starts(text) if text[begin:].strip()]

    def within(number: int) -> list[Message]:
        return [*system, {**messages[last], "content": text[begins[number] :]}, *messages[last + 1 :]]

    if len(begins) < 2 or not fits(within(len(begins) - 1)):
        return None
    over = (length(of(last)) or 0) - limit
    at = _first_that_fits(len(begins), over, lambda number: fits(within(number)))
    return Shortened(within(at), last - len(system), begins[at])


def _first_that_fits(count: int, about: int, fits: Callable[[int], bool]) -> int:
    """The first of the numbers below `count` for which `fits` holds, where 0 does not and the last does. It is looked
    for around `about` at first.
    """
    fits = functools.cache(fits)
    low, high = 0, count - 1
    for at in (about, about - 1, about + 1, about - 16, about + 16):
        if low < at < high:
            low, high = (low, at) if fits(at) else (at, high)
    return bisect_left(range(count), True, low + 1, high, key=fits)
