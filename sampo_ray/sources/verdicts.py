"""What a verdict says about a row's answers, and how the verdicts of a source are meant."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sampo_ray.config.columns import Columns, Means
from sampo_ray.sources.unusable import Unusable

TIE = "a tie"
BOTH_BAD = "both answers are bad"
NO_VERDICT = "no verdict"
OTHER_VERDICT = "a verdict of another kind"
DISAGREE = "verdicts that disagree"

_LETTERS = "abcdefghij"
_ORDINALS = ("first", "second", "third", "fourth")
_NUMERALS = ("one", "two", "three", "four")
_ENDS = ("left", "right")
_TIES = {"tie", "ties", "tied", "draw", "equal", "equally", "same", "both", "neither", "similar", "bothbad", "bothgood"}
_BAD = {"bad", "bothbad", "poor", "unacceptable"}
_NOTHING = re.compile("(none|null|nan|na|n_a|unknown|unsure|skip|skipped|invalid|error|no_answer|cannot_decide)?")
_NO_MATTER = re.compile(
    "the|is|was|wins|won|win|winner|better|best|prefer|preferred|preference|slightly|much|significantly|strongly|clearly|"
    "marginally|far|more|model|responses?|answer|assistant|output|candidate|option|completion|choice|choose|chosen|"
    "selected|summary|generation|system|conversation|chat|reply|text|side|number|id"
)
_COMPARED = re.compile(r"\s*\W*(\w+)\W*?\s*(>{1,3}|<{1,3}|={1,2})\s*\W*?(\w+)\W*\s*")
_WORD_BREAK = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])|[\W_]+")


def number_of(value: Any) -> float | None:
    """A finite number, also one in text, a boolean as 0 or 1; None for anything else."""
    if hasattr(value, "item"):  # of an array
        value = value.item()
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def better_of(verdict: object, means: Means | None, count: int) -> int:
    """Which of `count` answers, from 0, a number says is better. Raises Unusable."""
    number = number_of(verdict)
    if number is None:
        is_nothing = verdict is None or isinstance(verdict, float) or says_nothing(str(verdict))
        raise Unusable(NO_VERDICT if is_nothing else OTHER_VERDICT)
    if means == "sign":
        number = 0.5 if number == 0 else float(number > 0)
    elif means == "first":
        number = 1 - number
    elif means == "number":
        number = 0.5 if number == 0 and count == 2 else number - 1  # older AlpacaEval writes 0 for a draw
    if (means in ("sign", "first") and count != 2) or means in ("name", None) or not 0 <= number <= count - 1:
        raise Unusable(OTHER_VERDICT)
    if count == 2 and number == 0.5:
        raise Unusable(TIE)
    if count > 2 and number != int(number):
        raise Unusable(OTHER_VERDICT)
    return round(number)  # of two: 1.2 is mostly the first, 1.8 mostly the second


@lru_cache(maxsize=256)
def _of_columns(paths: tuple[str, ...], count: int) -> tuple[list[str], Mapping[str, int | None]]:
    """What tells the columns of answers apart, and what a verdict may call them whatever the row."""
    names, marks = order_names(count), marks_of(paths)
    if any(mark.isdecimal() for mark in marks):  # response_0 and response_1: a 1 is the second
        names = {name: side for name, side in names.items() if not name.isdecimal()}
    for side, (path, mark) in enumerate(zip(paths, marks, strict=True)):
        names |= {key_of(path): side, mark: side}
    return marks, names


@dataclass(frozen=True)
class Sides:
    """The names of a row's answers: each name's answer, from 0; None for a name that two of them have."""

    of: Mapping[str, int | None]
    answers: Sequence[object] = ()
    """The answers themselves: a verdict may repeat the better one."""

    def named(self, verdict: object) -> int:
        """The answer that a verdict names. Raises Unusable."""
        number, whole = number_of(verdict), verdict
        verdict = "" if verdict is None else str(verdict) if number is None else f"{number:g}"
        if compared := _COMPARED.fullmatch(verdict):
            first, sign, second = compared.groups()
            if "=" in sign:
                raise Unusable(TIE)
            verdict = first if sign[0] == ">" else second
        key = key_of(verdict)
        if (side := self.of.get(key)) is not None:
            return side
        words = set(key.split("_"))
        if says_nothing(verdict):
            raise Unusable(NO_VERDICT)
        if words & _TIES:
            raise Unusable(BOTH_BAD if words & _BAD else TIE)
        if key == "no_preference":
            raise Unusable(TIE)
        side = self.of.get(short_of(key))
        if side is None and self.answers.count(whole) == 1:
            return self.answers.index(whole)
        if side is None:
            raise Unusable(OTHER_VERDICT)
        return side


def sides_of(
    columns: Columns, values: Mapping[str, object], elements: Sequence[object], answers: Sequence[object]
) -> Sides:
    """What a verdict may call the answers: their columns, models, or the letters and numbers of their order."""
    several = columns.answers if isinstance(columns.answers, tuple) and len(columns.answers) > 1 else ()
    marks, names = _of_columns(several, max(len(several), len(elements)))
    names = dict(names)
    for side in range(len(elements)):
        mark = marks[side] if marks else _LETTERS[side : side + 1]
        for called in _called(values, mark, elements[side]):
            names[called] = side if names.get(called, side) == side else None
    return Sides(names, answers)


def says_nothing(text: str) -> bool:
    """Whether a verdict in text says that there is none."""
    return bool(_NOTHING.fullmatch(key_of(text)))


@lru_cache(maxsize=4096)
def key_of(text: str) -> str:
    """A name in lower case with one underscore between words, numbers and capitals: responseA is response_a."""
    return "_".join(word for word in _WORD_BREAK.sub(" ", text).lower().split())


def short_of(key: str) -> str:
    """A key without the words that do not tell answers apart."""
    return "_".join(word for word in key.split("_") if not _NO_MATTER.fullmatch(word))


def order_names(count: int) -> dict[str, int | None]:
    names: dict[str, int | None] = {}
    for words in (_LETTERS, _ORDINALS, _NUMERALS, _ENDS if count == 2 else ()):
        names |= {word: side for side, word in enumerate(words[:count])}
    return names | {str(side + 1): side for side in range(count)}


def marks_of(paths: Sequence[str]) -> list[str]:
    """What tells the columns of answers apart: the a and b of response_a and response_b."""
    words = [key_of(path).split("_") for path in paths]
    shared = set.intersection(*map(set, words)) if words else set()
    return ["_".join(word for word in each if word not in shared) for each in words]


def _called(values: Mapping[str, object], mark: str, element: object) -> Iterable[str]:
    """The names of the model that wrote an answer, and of an element of a list of answers."""
    found = [values.get(name) for name in (f"model_{mark}", f"model{mark}", f"{mark}_model", f"response_{mark}_model")]
    if isinstance(element, dict):
        found += [element.get(name) for name in ("id", "name", "model", "model_id", "model_name", "policy", "label")]
    return {key_of(name) for name in found if isinstance(name, str) and name}
