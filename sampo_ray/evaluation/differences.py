"""Whether two results differ: under which conditions they may be compared at all, by how much they differ, and whether
that is more than chance and the judge's own noise."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import SAMPLES, Conditions, Score, TaskResult, result_place
from sampo_ray.evaluation.statistics import Z, standard_error
from sampo_ray.run.storage import Place

LEAST = 10
"""Samples below which no difference is claimed: normal intervals are too narrow then."""
HARNESSES = ("lm_eval", "lm-eval", "alpaca_eval", "alpaca-eval", "ifbench")
DECISIVE: Mapping[str, str] = {
    "limit": "limit",
    "total": "samples in all",
    "shots": "shots",
    "shots_form": "form of the shots",
    "template": "chat template",
    "max_tokens": "max_tokens",
    "seed": "seed",
    "sampling": "sampling",
    "task_version": "version of the task",
    "route": "route",
    "bos": "beginning-of-text tokens",
}
"""Conditions that must be the same, and what they are called."""


@dataclass(frozen=True)
class Sample:
    """One sample's part in a score; `weight`: how many parts of its own it has."""

    value: float
    weight: float
    hash: str | None


@dataclass(frozen=True)
class Difference:
    """`value`: ours minus the other's, with its 95 % interval; None where the two may not be compared."""

    value: float | None
    low: float | None
    high: float | None
    paired: bool
    shown: bool
    """Whether it may be called a difference."""
    why: str
    """Why it is not shown, or cannot be computed; else empty."""


def read_samples(root: Place, result: TaskResult) -> list[Mapping[str, object]]:
    """The lines of `samples.jsonl`; none where there is no such file. EvaluationError for a line that is not JSON."""
    file = result_place(root, result.subject, result.task).at(SAMPLES)
    if not file.exists():
        return []
    found = list[Mapping[str, object]]()
    for number, line in enumerate(file.read().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise EvaluationError(f"{file.url} line {number} is no JSON object; remove the folder, and evaluate again")
        found.append(row)
    return found


def samples_of(lines: Sequence[Mapping[str, object]], score: Score) -> dict[str, Sample]:
    """What each sample adds to a score, by id; nothing where they do not add up to its value."""
    found: dict[str, Sample] = {}
    for line in lines:
        scores, weights = line.get("scores"), line.get("weights") or {}
        if not isinstance(scores, dict) or not isinstance(weights, dict) or "id" not in line:
            return {}
        if (value := scores.get(score.name)) is not None:
            found[str(line["id"])] = Sample(float(value), float(weights.get(score.name, 1)), _text(line.get("hash")))
    weight = sum(each.weight for each in found.values())
    mean = sum(each.value * each.weight for each in found.values()) / weight if weight else math.nan
    return found if math.isclose(mean, score.value, rel_tol=1e-4, abs_tol=1e-4) else {}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def differing(a: Conditions, b: Conditions) -> list[str]:
    """What keeps two results of a task from being compared, each as `limit: 50 and all`."""
    found = []
    for field, title in DECISIVE.items():
        ours, others = getattr(a, field), getattr(b, field)
        if ours != others:
            none = "all" if field == "limit" else "none"
            shown = [none if value is None else value for value in (ours, others)]
            found.append(f"{title}: {shown[0]} and {shown[1]}")
    for package in HARNESSES:
        if a.packages.get(package) != b.packages.get(package):
            found.append(f"{package}: {a.packages.get(package)} and {b.packages.get(package)}")
    judges = [each and (each.name, each.preset, each.weighted) for each in (a.judge, b.judge)]
    if judges[0] != judges[1]:
        names = [each.name if each else "none" for each in (a.judge, b.judge)]
        apart = "its preset or weighting" if names[0] == names[1] else f"{names[0]} and {names[1]}"
        found.append(f"judge: {apart}")
    if not found and a.first_prompt != b.first_prompt:
        found.append("the first prompt")
    return found


def difference(ours: tuple[Place, TaskResult], other: tuple[Place, TaskResult], a: Score, b: Score) -> Difference:
    """Of score `a` of our result and `b` of another of the same task."""
    apart = differing(ours[1].conditions, other[1].conditions)
    if a.name != b.name:
        apart.append(f"score: {a.name} and {b.name}")
    if apart:
        return not_compared("; ".join(apart))
    mine, others = samples_of(read_samples(*ours), a), samples_of(read_samples(*other), b)
    if any(mine[id].hash != others[id].hash for id in mine.keys() & others.keys()):
        return not_compared("the samples of one name have other content")
    paired = bool(mine) and mine.keys() == others.keys()
    if paired:
        interval = paired_interval([mine[id] for id in mine], [others[id] for id in mine], a.unit == "share")
    else:
        interval = unpaired_interval(a, b)
    return _judged(a, b, interval, paired, _noise(a, ours[1].conditions, other[1].conditions))


def paired_interval(a: Sequence[Sample], b: Sequence[Sample], share: bool) -> tuple[float, float] | None:
    """Of the mean difference of the same samples, weighted as the score weighs them. Shares get one pseudo-sample for
    and one against (Bonett and Price, 2012), without which few samples that all agree would leave no width."""
    if len(a) < 2:
        return None
    size = fmean(each.weight for each in a)
    gaps = [(x.value - y.value, x.weight / size) for x, y in zip(a, b, strict=True)]
    gaps += [(1.0, 1.0), (-1.0, 1.0)] if share else []
    mean = fmean(gap * weight for gap, weight in gaps) / fmean(weight for _, weight in gaps)
    error = standard_error([(gap - mean) * weight for gap, weight in gaps])
    return None if error is None else (mean - Z * error, mean + Z * error)


def unpaired_interval(a: Score, b: Score) -> tuple[float, float] | None:
    """From the two scores' own intervals (Newcombe's method 10 for shares; Zou and Donner, 2008, for others)."""
    of_a, of_b, gap = bounds(a), bounds(b), a.value - b.value
    if of_a is None or of_b is None:
        return None
    (la, ua), (lb, ub) = of_a, of_b
    return gap - math.hypot(a.value - la, ub - b.value), gap + math.hypot(ua - a.value, b.value - lb)


def bounds(score: Score) -> tuple[float, float] | None:
    """The 95 % interval of a score, if it has one or a standard error."""
    if score.low is not None and score.high is not None:
        return score.low, score.high
    return None if score.stderr is None else (score.value - Z * score.stderr, score.value + Z * score.stderr)


def _noise(score: Score, a: Conditions, b: Conditions) -> float | None:
    """What repeats of the judging alone may make of a difference, with 95 %; None: nobody measured it."""
    spreads = [each.judge.repeat_spread for each in (a, b) if each.judge is not None]
    if score.unit != "share" or not spreads:
        return 0.0
    return None if None in spreads else Z * math.hypot(*(each for each in spreads if each is not None))


def _judged(a: Score, b: Score, interval: tuple[float, float] | None, paired: bool, noise: float | None) -> Difference:
    value = a.value - b.value
    low, high = interval or (None, None)
    why = ""
    if low is None or high is None:
        why = "no difference shown: no interval"
    elif min(a.count, b.count) < LEAST:
        why = f"no difference shown: fewer than {LEAST} samples"
    elif low <= 0 <= high:
        why = "no difference shown"
    elif noise is None:
        why = "no difference shown: the judge's spread over repeats was not measured"
    elif abs(value) <= noise:
        why = "no difference shown: within the judge's spread over repeats"
    return Difference(value, low, high, paired, not why, why)


def not_compared(why: str) -> Difference:
    return Difference(None, None, None, False, False, f"not compared ({why})")


def lengths(lines: Sequence[Mapping[str, object]]) -> Iterator[int]:
    """Tokens of the answers."""
    for line in lines:
        if isinstance(tokens := line.get("tokens"), int):
            yield tokens
