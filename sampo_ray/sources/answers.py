"""Which of a row's answers is chosen and which is rejected: verdicts, scores and ranks."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sampo_ray.config.columns import Columns, Paths
from sampo_ray.sources.paths import at, has
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import DISAGREE, NO_VERDICT, OTHER_VERDICT, TIE, better_of, number_of, sides_of

FEW = "fewer than two answers that can be compared"
UNEQUAL = "not as many scores as answers"
ALONE = "no neighbour with the same prompt (sort the rows by prompt)"
"""Of a source with one answer a row."""
NEIGHBOURS = "neighbours"
"""The form of such a source."""


def pick(values: Mapping[str, object], columns: Columns) -> tuple[object, object]:
    """The values of the chosen and the rejected answer, as the row has them: text, a message or a conversation.

    A verdict counts before scores, scores before ranks. Of several answers with the best or the worst score the first
    is taken; with a verdict on more than two, the first of the others is rejected. Raises Unusable.
    """
    if columns.chosen is not None and columns.rejected is not None:
        chosen, rejected = at(values, columns.chosen), at(values, columns.rejected)
        if columns.prompt is not None:  # without one, a list of texts is a conversation
            chosen, rejected = _first_of_several(chosen), _first_of_several(rejected)
        return chosen, rejected
    elements, answers = answers_of(values, columns)
    if columns.verdict is not None:
        if len(answers) < 2 and any(at(values, path) for path in paths_of(columns.verdict)):
            raise Unusable(FEW)
        better = _judged(values, columns, elements, answers)
        others = [n for n, answer in enumerate(answers) if n != better and answer is not None]
        if answers[better] is None or not others:
            raise Unusable(FEW)
        return answers[better], answers[others[0]]
    scores = _scores(values, columns.score or columns.rank, elements)
    ranked = [(score, n) for n, score in enumerate(scores) if score is not None and answers[n] is not None]
    if len(ranked) < 2:
        raise Unusable(ALONE if columns.form == NEIGHBOURS else FEW)
    highest = max(ranked, key=lambda each: each[0])
    lowest = min(ranked, key=lambda each: each[0])
    if highest[0] == lowest[0]:
        raise Unusable(TIE)
    best, worst = (highest, lowest) if columns.score else (lowest, highest)
    return answers[best[1]], answers[worst[1]]


def paths_of(paths: Paths | None) -> tuple[str, ...]:
    """One path or several as several."""
    return () if paths is None else (paths,) if isinstance(paths, str) else tuple(paths)


def _first_of_several(value: object) -> object:
    """The first of a list of answers; any other value as it is."""
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    return value[0] if several else value  # type: ignore[index]  # it is a list


def answers_of(values: Mapping[str, object], columns: Columns) -> tuple[list[object], list[object]]:
    """The elements that hold the answers, and the answers in them; None for one that is not there."""
    paths = paths_of(columns.answers)
    elements = [at(values, path) for path in paths] if len(paths) != 1 else _listed(at(values, paths[0]))
    text = columns.text
    answers = [at(each, text) if text is not None and isinstance(each, dict) else each for each in elements]
    return elements, answers


def _listed(value: object) -> list[object]:
    """A list, also one that a text spells; [] for anything else."""
    value = spelled(value)
    if not isinstance(value, list) and hasattr(value, "tolist"):  # an array
        value = value.tolist()
    return value if isinstance(value, list) else []


def _judged(
    values: Mapping[str, object], columns: Columns, elements: Sequence[object], answers: Sequence[object]
) -> int:
    """The number, from 0, of the answer that the row's verdict says is better."""
    paths = paths_of(columns.verdict)
    if len(paths) > 1:
        return _flagged([at(values, path) for path in paths], len(answers))
    verdict = _agreed(at(values, paths[0]))
    if columns.means == "name" or (columns.means is None and isinstance(verdict, str)):
        return sides_of(columns, values, elements, answers).named(verdict)
    return better_of(verdict, columns.means, len(answers))


def _agreed(verdict: object) -> object:
    """The one verdict of a list of them, as several people give."""
    if not isinstance(verdict := spelled(verdict), list):
        return verdict
    different = {json.dumps(each, sort_keys=True, default=str): each for each in verdict if each is not None}
    if len(different) > 1:
        raise Unusable(DISAGREE)
    return next(iter(different.values()), None)


def _flagged(flags: Sequence[object], count: int) -> int:
    """The number of the only answer whose column is true; a column more than answers is that of a tie."""
    numbers = [number_of(flag) for flag in flags]
    if all(number is None for number in numbers):
        raise Unusable(NO_VERDICT)
    if any(number not in (0, 1, None) for number in numbers):
        raise Unusable(OTHER_VERDICT)
    better = [n for n, number in enumerate(numbers) if number == 1]
    if len(better) != 1 or better[0] >= count:
        raise Unusable(TIE)
    return better[0]


def _scores(values: Mapping[str, object], paths: Paths | None, elements: Sequence[object]) -> list[float | None]:
    """The number that each answer has; None for one that has none."""
    several = paths_of(paths)
    if not several:
        raise Unusable(NO_VERDICT)
    if len(several) > 1:
        found = [at(values, path) for path in several]
    elif any(isinstance(element, dict) and has(element, several[0]) for element in elements):
        found = [at(element, several[0]) for element in elements]
    else:
        found = _listed(at(values, several[0]))
    if len(found) != len(elements):
        raise Unusable(UNEQUAL)
    return [_mean(score) for score in found]


def _mean(score: Any) -> float | None:
    """A score as a number; the mean of several, as those of a wildcard path."""
    if not isinstance(score, list):
        return number_of(score)
    numbers = [number for each in score if (number := number_of(each)) is not None]
    return math.fsum(number / len(numbers) for number in numbers) if numbers else None
