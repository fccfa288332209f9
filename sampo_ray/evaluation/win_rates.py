"""AlpacaEval 2's win rate and length-controlled win rate, by its own GLM, of preferences that are fit for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.alpaca_data import BASELINE, ROWS, AlpacaData, check_instructions
from sampo_ray.evaluation.records import MOST_LOST
from sampo_ray.internals.alpaca_eval import length_controlled_winrate

SEVERAL = 10
"""Answers that are hardly all of one length by chance."""


@dataclass(frozen=True)
class WinRates:
    """Shares, 0 to 1. `stderr`: the standard errors that alpaca_eval gives."""

    win_rate: float
    win_rate_stderr: float
    length_controlled: float
    length_controlled_stderr: float
    at_equal_length: tuple[float, ...]
    """[805] The preference for each output, 0 to 1, that the GLM predicts without a difference in length; its mean is
    `length_controlled`."""
    count: int
    """Rows with a preference."""


def win_rates(
    data: AlpacaData,
    model: str,
    instructions: Sequence[str],
    outputs: Sequence[str],
    preferences: Sequence[float | None],
) -> WinRates:
    """Rates of a `model` with these outputs against the baseline, from preferences between 1 (the baseline's output is
    better) and 2; 1.5 is a tie, None no verdict. EvaluationError for what would give a number and a wrong one."""
    check_model(model)
    check_instructions(instructions, f"outputs of {model}")
    _check_differences(data, outputs)
    check_preferences(preferences)
    annotations: list[dict[str, object]] = [
        {
            "output_1": theirs,
            "output_2": ours,
            "generator_1": BASELINE,
            "generator_2": model,
            "preference": math.nan if preference is None else preference,
        }
        for theirs, ours, preference in zip(data.outputs, outputs, preferences, strict=True)
    ]
    found, predicted = length_controlled_winrate(annotations, data.gamed)
    names = ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error")
    rate, error, controlled, controlled_error = (found[name] / 100 for name in names)
    if not all(map(math.isfinite, (rate, error, controlled, controlled_error))):
        raise EvaluationError(f"alpaca_eval's GLM has no length-controlled win rate for {model}; look at its outputs")
    count = sum(each is not None for each in preferences)
    return WinRates(rate, error, controlled, controlled_error, tuple(predicted), count)


def check_model(model: str) -> None:
    """A model of the baseline's name has a length-controlled rate of one half, whatever it answers."""
    if model == BASELINE:
        raise EvaluationError(
            f"model={model!r} is the baseline's name, which alpaca_eval takes for it; name it otherwise"
        )


def check_answers(answers: Sequence[str]) -> None:
    """EvaluationError for answers of a model that no judge needs to see: all of one length, as if it had not read the
    instructions. (Published outputs of such a "model", made to deceive judges, have their rates all the same.)"""
    lengths = {len(answer) for answer in answers}
    if len(answers) >= SEVERAL and len(lengths) == 1:
        raise EvaluationError(
            f"all {len(answers)} answers have {lengths.pop()} characters, so that nothing is known of the effect of "
            "length; look at the answers, which may be empty or cut"
        )


def _check_differences(data: AlpacaData, outputs: Sequence[str]) -> None:
    if len(outputs) != ROWS:
        raise EvaluationError(f"{len(outputs)} outputs instead of {ROWS}; length control goes by row, so give all")
    if len({len(ours) - len(theirs) for ours, theirs in zip(outputs, data.outputs, strict=True)}) == 1:
        raise EvaluationError(
            "all outputs differ from the baseline's by the same number of characters, so that nothing is known of the "
            "effect of length; are these the baseline's outputs?"
        )


def check_preferences(preferences: Sequence[float | None]) -> None:
    if len(preferences) != ROWS:
        raise EvaluationError(f"{len(preferences)} preferences instead of {ROWS}; give None where there is no verdict")
    given = [each for each in preferences if each is not None]
    lost = ROWS - len(given)
    if lost > MOST_LOST * ROWS:
        raise EvaluationError(f"{lost} of {ROWS} answers have no verdict, more than {MOST_LOST:.0%}: there is no score")
    if outside := next((each for each in given if not 1.0 <= each <= 2.0), None):
        raise EvaluationError(_scale(outside))
    if any(each == 0.0 for each in given):
        raise EvaluationError(_scale(0.0))


def _scale(value: float) -> str:
    return (
        f"preference {value:g} is not between 1 (the baseline is better) and 2 (the model is), which is alpaca_eval's "
        "scale; add 1 to preferences between 0 and 1, and give None where there is no verdict"
    )


def spread_of(rates: Sequence[float]) -> float | None:
    """Standard deviation over repeats; None for one."""
    return stdev(rates) if len(rates) > 1 else None
