"""From answers to honest scores: what was lost of them, and how sure a share is."""

from collections.abc import Sequence
from typing import Any

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation import statistics
from sampo_ray.evaluation.asking import Answer
from sampo_ray.evaluation.records import MOST_LOST, Score


def lost(answers: Sequence[Answer], task: str) -> dict[str, int]:
    """Counts of answers that failed, are empty, or were cut. EvaluationError when more than MOST_LOST are none."""
    failed = sum(answer.error is not None for answer in answers)
    empty = sum(answer.error is None and not answer.text.strip() for answer in answers)
    cut = sum(answer.finish == "length" for answer in answers)
    if answers and failed + empty > MOST_LOST * len(answers):
        why = next((answer.error for answer in answers if answer.error), None)
        raise EvaluationError(
            f"{task} has no score: of {len(answers)} answers {empty} are empty and {failed} failed, more than "
            f"{MOST_LOST:.0%}{f' ({why})' if why else ''}; {cut} were cut at their most tokens"
        )
    return {"failed": failed, "empty": empty, "cut": cut}


def score_of(name: str, value: float, samples: Sequence[Any]) -> Score:
    """A share with its interval: of right and wrong samples, or of samples with several parts each (a ratio)."""
    parts = [list(map(float, each)) if isinstance(each, list | tuple) else [float(each)] for each in samples]
    found = sum(map(sum, parts)) / sum(map(len, parts))
    if abs(found - value) > 1e-6:
        raise EvaluationError(
            f"{name} is {value} by the harness and {found} by its samples; its version is another one"
        )
    n, mean_size = len(parts), sum(map(len, parts)) / len(parts)
    stderr = statistics.standard_error([(sum(each) - found * len(each)) / mean_size for each in parts])
    if all(len(each) == 1 for each in parts):
        low, high = statistics.wilson(found * n, n)
    else:
        reach = statistics.Z * (stderr or 0.0)
        low, high = max(0.0, found - reach), min(1.0, found + reach)
    return Score(name=name, value=value, stderr=stderr, low=low, high=high, count=n)
