"""Which answers to a prompt are compared with each other, and what rewards that makes."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

MOST_OPPONENTS = 4
"""Of an answer: each is compared with each other where there are up to five, else with four of them."""


def matches(count: int) -> list[tuple[int, int]]:
    """Which of `count` answers are compared: all pairs, or a ring in which each meets its two neighbours on either
    side, so that the number of calls grows with that of answers and not with its square."""
    reach = MOST_OPPONENTS // 2
    if count <= 2 * reach + 1:
        return list(itertools.combinations(range(count), 2))
    return [(i, (i + step) % count) for i in range(count) for step in range(1, reach + 1)]


def calls_of(count: int) -> int:
    """Comparisons of `count` different answers."""
    return len(matches(count))


def strengths(count: int, met: Sequence[tuple[int, int]], shares: Iterable[float | None]) -> list[float | None]:
    """[count]: a score for each answer, which adds up to 0, from `shares`: how far the first of each match that was
    `met` is preferred, 0 to 1, or None without a verdict.

    Least squares of `s_i - s_j = share - 1/2` (HodgeRank; Jiang et al. 2011, arXiv 0811.1067), so that a strong
    opponent costs nothing. Where all met all, it is the mean share minus a half, but for a factor. Answers outside the
    largest group that is connected by verdicts have None: nothing says where they stand.
    """
    judged = [(pair, share) for pair, share in zip(met, shares, strict=True) if share is not None]
    group = _largest_group(count, [pair for pair, _ in judged])
    if len(group) < 2:
        return [None] * count
    at = {answer: row for row, answer in enumerate(group)}
    inside = [(pair, share) for pair, share in judged if pair[0] in at]
    differences, margins = np.zeros((len(inside), len(group))), np.zeros(len(inside))
    for row, ((i, j), share) in enumerate(inside):
        differences[row, at[i]], differences[row, at[j]], margins[row] = 1.0, -1.0, share - 0.5
    found = np.linalg.lstsq(differences, margins, rcond=None)[0]  # the one of least norm: it adds up to 0
    rounded = np.round(found - found.mean(), 9) + 0.0  # equals stay equal
    return [float(rounded[at[i]]) if i in at else None for i in range(count)]


def _largest_group(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The largest set of answers that are connected by pairs; of equally large ones, that with the lowest number."""
    group = list(range(count))
    for i, j in pairs:
        old, new = max(group[i], group[j]), min(group[i], group[j])
        group = [new if each == old else each for each in group]
    largest = max(set(group), key=lambda each: (group.count(each), -each)) if group else -1
    return [i for i, each in enumerate(group) if each == largest]
