"""How sure a number is: intervals of shares, means and differences, all of 95 %."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z = 1.959964
"""Quantile of the normal distribution for 95 %."""


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of the share `successes / count`."""
    p, n = successes / count, count
    centre = p + Z * Z / (2 * n)
    reach = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # At 0 and at 1 a bound is the share itself, but for rounding.
    low, high = (centre - reach) / (1 + Z * Z / n), (centre + reach) / (1 + Z * Z / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The normal interval of a mean of independent values, such as differences of pairs; None for fewer than two."""
    error = standard_error(values)
    return None if error is None else (fmean(values) - Z * error, fmean(values) + Z * error)


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Least squares of y on x: the slope and its standard error. None where x does not vary, or for fewer than three
    points."""
    if len(x) < 3:
        return None
    mx, my = fmean(x), fmean(y)
    spread = sum((each - mx) ** 2 for each in x)
    if not spread:
        return None
    b = sum((u - mx) * (v - my) for u, v in zip(x, y, strict=True)) / spread
    rest = sum((v - my - b * (u - mx)) ** 2 for u, v in zip(x, y, strict=True))
    return b, math.sqrt(rest / (len(x) - 2) / spread)
