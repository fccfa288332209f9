"""Win rates at equal style: of length and markdown together, as Arena-Hard v2 controls for them.

A logistic regression over the judged answers of all rows (Li, Angelopoulos and Chiang, 2024, "Does style matter?"):

    logit P(our answer is preferred) = a[row] + sum over features f of b[f] * d[f] / sd(d[f])

where d[f] is the normalised difference (ours - reference) / (ours + reference) of a feature: characters, and headers,
list items and bold passages by character. sigmoid(a[row]) is the win rate against a reference of the same style.
Intervals are of the sandwich estimator, prompts as clusters: a row's answers share them with the other rows'.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.comparison import Row
from sampo_ray.evaluation.differences import LEAST, differing, read_samples
from sampo_ray.evaluation.statistics import Z

FEATURES = ("length", "headers", "lists", "bold")
TITLE = "AlpacaEval2"
RIDGE = 1e-3
"""Keeps the fit finite where all are won, or a feature tells winners apart without fail."""
_MARKS = (r"^#{1,6} ", r"^\s*(?:[-*+]|\d+[.)])\s", r"\*\*[^*\n]+\*\*|__[^_\n]+__")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Controlled:
    """A row's win rate, as judged and at equal style, as shares."""

    name: str
    raw: float
    rate: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Style:
    rows: tuple[Controlled, ...]
    weights: Mapping[str, float]
    """What a standard deviation of each feature's difference adds to the log-odds; 0 where it does not vary."""


def features(text: str) -> Array:
    """[4] Characters, and headers, list items and bold passages by character; blocks of code do not count as style."""
    prose = re.sub(r"```.*?(?:```|\Z)", "", text, flags=re.DOTALL)
    counts = [len(re.findall(mark, prose, re.MULTILINE)) for mark in _MARKS]
    return np.array([len(text), *(count / max(1, len(prose)) for count in counts)])


def normalised(ours: Array, reference: Array) -> Array:
    """(ours - reference) / (ours + reference), and 0 where neither has any."""
    total = ours + reference
    return np.divide(ours - reference, total, out=np.zeros_like(total), where=total > 0)


def style_controlled(rows: Sequence[Row]) -> Style:
    """Of the judged rows. EvaluationError where there are none, or where they were judged under other conditions."""
    judged = {row.name: cell for row in rows if (cell := row.cells.get(TITLE)) is not None}
    if not judged:
        raise EvaluationError("style control: no run has results of alpaca_eval; evaluate it, or leave the option out")
    first = next(iter(judged.values())).result
    for name, cell in judged.items():
        if apart := differing(cell.result.conditions, first.conditions):
            raise EvaluationError(f"style control: {name} was judged under other conditions ({'; '.join(apart)})")
    pairs = {name: _pairs(read_samples(cell.root, cell.result), cell.score.name) for name, cell in judged.items()}
    for name, found in pairs.items():
        if len(found) < LEAST:
            raise EvaluationError(
                f"style control: {name} has {len(found)} judged samples with both answers and needs {LEAST} or more"
            )
    return fitted(pairs)


def _pairs(lines: Sequence[Mapping[str, object]], score: str) -> dict[str, tuple[Array, float]]:
    """By sample: the difference of style [4], and how far our answer is preferred."""
    found = {}
    for line in lines:
        ours, reference, scores = line.get("answer"), line.get("reference"), line.get("scores")
        value = scores.get(score) if isinstance(scores, dict) else None
        if isinstance(ours, str) and isinstance(reference, str) and value is not None:
            found[str(line.get("id"))] = (normalised(features(ours), features(reference)), float(value))
    return found


def fitted(pairs: Mapping[str, Mapping[str, tuple[Array, float]]]) -> Style:
    """Of each row's judged samples: the difference of style [4], and how far our answer is preferred."""
    names, flat = list(pairs), [(n, id, *pair) for n, of in enumerate(pairs.values()) for id, pair in of.items()]
    style = np.array([each[2] for each in flat])
    spread = style.std(axis=0)
    scaled = np.divide(style, spread, out=np.zeros_like(style), where=spread > 0)
    x = np.concatenate([np.eye(len(names))[[each[0] for each in flat]], scaled], axis=1)
    y = np.array([each[3] for each in flat])
    fit, covariance = logistic(x, y, [each[1] for each in flat])
    rows = []
    for n, name in enumerate(names):
        error = math.sqrt(covariance[n, n])
        low, rate, high = (_sigmoid(fit[n] + reach * error) for reach in (-Z, 0.0, Z))
        rows.append(Controlled(name, float(y[x[:, n] > 0].mean()), rate, low, high, len(pairs[name])))
    weights = dict(zip(FEATURES, map(float, fit[len(names) :]), strict=True))
    return Style(tuple(rows), weights)


def logistic(x: Array, y: Array, clusters: Sequence[str]) -> tuple[Array, Array]:
    """The fit [k] of logit E[y] = x @ fit for x [n, k] and y [n] from 0 to 1 by Newton's method, and its clustered
    sandwich covariance [k, k]."""
    fit, ridge = np.zeros(x.shape[1]), RIDGE * np.eye(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(x @ fit)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * fit)
        fit = fit + step
        if np.abs(step).max() < 1e-9:
            break
    p = 1 / (1 + np.exp(-(x @ fit)))
    hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
    _, members = np.unique(np.array(clusters), return_inverse=True)
    sums = np.zeros((int(members.max()) + 1, x.shape[1]))
    np.add.at(sums, members, x * (y - p)[:, None])
    inverse = np.linalg.inv(hessian)
    return fit, inverse @ (sums.T @ sums) @ inverse


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
