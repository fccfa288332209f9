"""What a layout is, and the short story that all rows tell: a light, its steps, and who counts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]
Turns: TypeAlias = list[dict[str, Any]]
Pair: TypeAlias = tuple[Turns, str, str]

QUESTION = "How many steps lead up to the light of Brann?"
GOOD = "Two hundred and twelve; the last one creaks."
BAD = "Several."
NEXT = "Who counts them?"
GOOD_NEXT = "The keeper's daughter, each first of May."
BAD_NEXT = "People do."
SYSTEM = "You are the guide of the Brann light."
ASIDE = "The stair was rebuilt after the storm."


@dataclasses.dataclass(frozen=True)
class Refused:
    """No row may be read. `why`: what the refusal, or the reason that rows are dropped for, says."""

    why: str = ""


@dataclasses.dataclass(frozen=True)
class Anything:
    """Not judged."""


@dataclasses.dataclass(frozen=True)
class Either:
    """Any of these is right: the layout leaves it open."""

    choices: tuple[Expected, ...]


Expected: TypeAlias = Sequence[Any] | Refused | Either | Anything


@dataclasses.dataclass(frozen=True)
class Layout:
    """`pairs`: each as (turns, chosen, rejected); `prompts`: turns of each.

    `tools`: what rows must carry where they are read; they may be refused for them as well. `columns`: what a user
    gives as data.columns.
    """

    name: str
    source: str
    rows: Sequence[Fields]
    pairs: Expected
    prompts: Expected
    container: str = "jsonl"
    tools: list[Fields] | None = None
    columns: Fields | None = None


def layout(
    name: str, source: str, *rows: Fields, pairs: Expected, prompts: Expected | None = None, **others: Any
) -> Layout:
    """A layout; its prompts are those of its pairs unless they are given."""
    if prompts is None:
        prompts = pairs if isinstance(pairs, Refused) else _prompts_of(pairs)
    return Layout(name, source, rows, pairs, prompts, **others)


def _prompts_of(pairs: Sequence[Pair] | Either) -> Expected:
    if isinstance(pairs, Either):
        return Either(tuple(each if isinstance(each, Refused) else _prompts_of(each) for each in pairs.choices))
    return [prompt for prompt, _, _ in pairs]


def either(*choices: Expected) -> Either:
    """Any of these."""
    return Either(choices)


def user(text: str = QUESTION) -> Fields:
    return {"role": "user", "content": text}


def assistant(text: str = GOOD) -> Fields:
    return {"role": "assistant", "content": text}


def system(text: str = SYSTEM) -> Fields:
    return {"role": "system", "content": text}


def human(text: str = QUESTION) -> Fields:
    return {"from": "human", "value": text}


def gpt(text: str = GOOD) -> Fields:
    return {"from": "gpt", "value": text}


def parts(role: str, text: str) -> Fields:
    """A turn whose content is a list of parts."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


EARLIER: Turns = [user(), assistant()]
LATER: Turns = [*EARLIER, user(NEXT)]
ONE: Pair = ([user()], GOOD, BAD)
TOLD: Pair = ([system(), user()], GOOD, BAD)
TWO: Pair = (LATER, GOOD_NEXT, BAD_NEXT)
TOLD_TWO: Pair = ([system(), *LATER], GOOD_NEXT, BAD_NEXT)
NO_PAIRS = Refused()
