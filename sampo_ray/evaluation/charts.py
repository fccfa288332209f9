"""Where the marks of the comparison page's charts go: numbers for inline SVG, without a plotting library."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sampo_ray.evaluation.comparison import Curve, Figure, Row
from sampo_ray.evaluation.records import Score
from sampo_ray.evaluation.tasks import Column

WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 14, 46
Place = Callable[[float], float]
"""From a value to where it is in the picture."""


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Label:
    text: str
    x: float
    y: float
    anchor: str

    def overlaps(self, other: "Label") -> bool:
        return (
            abs(self.y - other.y) < 13
            and self._left < other._left + other._width
            and (other._left < self._left + self._width)
        )

    @property
    def _width(self) -> float:
        return 6.6 * len(self.text) + 4

    @property
    def _left(self) -> float:
        return self.x - (self._width if self.anchor == "end" else 0)


@dataclass(frozen=True)
class Mark:
    """A point with its interval in each direction, in units of the picture."""

    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    title: str
    label: "Label | None"
    """None: the same is there already."""


@dataclass(frozen=True)
class Line:
    name: str
    marks: tuple[Mark, ...]

    @property
    def path(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    even: float | None
    """Where a win rate of one half is, if that is in the picture."""


@dataclass(frozen=True)
class Bar:
    """A difference with its interval; `shown`: it may be called one."""

    row: str
    series: int
    y: float
    x: float
    low: float
    high: float
    shown: bool
    title: str


@dataclass(frozen=True)
class Group:
    title: str
    y: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Forest:
    groups: tuple[Group, ...]
    x: tuple[Tick, ...]
    zero: float
    height: float


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that lie around `low` to `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if span / (power * each) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * n for n in range(first, max(last, first + 1) + 1)]


def text(value: float) -> str:
    return f"{value:.6g}"


def chart(figure: Figure) -> Chart:
    """Mean tokens to the right, win rate in percent upwards."""
    found = [_bounds(each.tokens, 1) for curve in figure.curves for each in curve.points]
    rates = [_rate(each.score) for curve in figure.curves for each in curve.points]
    xs = ticks(min(low for _, low, _ in found), max(high for _, _, high in found))
    ys = ticks(max(0.0, min(low for _, low, _ in rates)), min(100.0, max(high for _, _, high in rates)))

    def across(value: float) -> float:
        return LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    lines, taken = [], list[Label]()
    for curve in figure.curves:
        lines.append(Line(curve.name, tuple(_marks(curve, across, up, taken))))
    even = up(50) if ys[0] < 50 < ys[-1] else None
    x_ticks, y_ticks = (tuple(Tick(place(v), text(v)) for v in values) for place, values in ((across, xs), (up, ys)))
    return Chart(figure.title, tuple(lines), x_ticks, y_ticks, even)


def _marks(curve: Curve, across: Place, up: Place, taken: list[Label]) -> list[Mark]:
    marks = []
    for point in curve.points:
        (t, left, right), (s, low, high) = _bounds(point.tokens, 1), _rate(point.score)
        x, y = across(t), up(s)
        of_base = " (against itself)" if point.score is None else f" [{low:.1f}, {high:.1f}]"
        title = f"{curve.name}, {point.label}: {s:.1f} %{of_base} at {t:.0f} tokens"
        bounds = (across(left), across(right), up(low), up(high))
        marks.append(Mark(x, y, *bounds, title, _label(point.label, x, y, taken)))
    return marks


def _label(text: str, x: float, y: float, taken: list[Label]) -> Label | None:
    """Beside its point where nothing is written yet, if there is such a place."""
    corners = [Label(text, x + dx, y + dy, a) for dx, a in ((8, "start"), (-8, "end")) for dy in (-8, 17, 4.5, -21, 30)]
    if any(other.text == text and abs(other.x - corners[0].x) < 4 and abs(other.y - y) < 34 for other in taken):
        return None
    inside = [each for each in corners if each._left > LEFT and each._left + each._width < WIDTH - 4] or corners
    chosen = next((each for each in inside if not any(each.overlaps(other) for other in taken)), inside[0])
    taken.append(chosen)
    return chosen


def _rate(score: Score | None) -> tuple[float, float, float]:
    return (50.0, 50.0, 50.0) if score is None else _bounds(score, 100)


def _bounds(score: Score, scale: float) -> tuple[float, float, float]:
    low, high = (score.value if bound is None else bound for bound in (score.low, score.high))
    return scale * score.value, scale * low, scale * high


def forest(rows: Sequence[Row], columns: Sequence[Column]) -> Forest | None:
    """Differences of shares to the base, in percentage points; None where there are none."""
    found = [
        (column.title, series, row.name, gap)
        for column in columns
        if column.unit == "share"
        for series, row in enumerate(rows)
        if (gap := row.differences.get(column.title)) is not None and gap.low is not None
    ]
    if not found:
        return None
    bounds = [100 * each for _, _, _, gap in found for each in (gap.low or 0.0, gap.high or 0.0, gap.value or 0.0)]
    xs, left = ticks(min(0.0, *bounds), max(0.0, *bounds)), 118

    def across(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - left - RIGHT)

    groups, y = list[Group](), float(TOP)
    for title in dict.fromkeys(title for title, *_ in found):
        bars, top = [], y
        for _, series, name, gap in (each for each in found if each[0] == title):
            y += 17
            value, low, high = (100 * (each or 0.0) for each in (gap.value, gap.low, gap.high))
            about = f"{name}, {title}: {value:+.1f} points [{low:+.1f}, {high:+.1f}]{gap.why and ', ' + gap.why}"
            bars.append(Bar(name, series, y, across(value), across(low), across(high), gap.shown, about))
        groups.append(Group(title, (top + 17 + y) / 2, tuple(bars)))
        y += 15
    return Forest(tuple(groups), tuple(Tick(across(v), f"{v:+.6g}" if v else "0") for v in xs), across(0), y + BOTTOM)
