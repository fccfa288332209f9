"""Whether the answer to a question of arithmetic is right, as lm-evaluation-harness' task gsm8k reads numbers."""

import re
from collections.abc import Sequence
from typing import Literal

from sampo_ray.errors import RewardError

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
ROOM = 1000
"""Characters of a number, at most."""


def reward(
    completions: Sequence[str], answer: Sequence[object], match: Literal["strict", "flexible"] = "flexible"
) -> list[float | None]:
    """1 for a completion with the right number, else 0; None where the row has no answer.

    `answer` is the column of that name: a number, or a text that ends in `#### 42`, as GSM8K has it. `strict` takes the
    number behind the first `####`; `flexible` the last number of the completion. Numbers are compared as texts without
    `,`, `$` and a full stop at the end, as the harness does (its keys `exact_match,strict-match` and
    `exact_match,flexible-extract`): 42.0 is not 42.
    """
    if match not in ("strict", "flexible"):
        raise RewardError(f"match={match!r} is not known; use strict or flexible")
    read = first_marked if match == "strict" else last_number
    return [
        None if right is None else float(normal(read(text)) == normal(str(right)))
        for text, right in zip(completions, answer, strict=True)
    ]


def first_marked(text: str) -> str:
    """The number behind the first `#### `; a text that is no number where there is none."""
    found = STRICT.search(text)
    return found[1] if found else "[invalid]"


def last_number(text: str) -> str:
    found = FLEXIBLE.findall(text)
    return found[-1] if found else "[invalid]"


def normal(number: str) -> str:
    """A number as it is compared; of a text with `#### ` only what is behind the last."""
    number = number.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return number.removesuffix(".").lower()
