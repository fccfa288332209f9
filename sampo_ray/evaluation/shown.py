"""How numbers are written in tables, pages and cards: shares in percent, with their intervals."""

from collections.abc import Sequence

from sampo_ray.evaluation.comparison import Cell, Comparison, is_trial
from sampo_ray.evaluation.differences import HARNESSES, Difference, bounds
from sampo_ray.evaluation.records import Conditions, Score, Unit

PLACES: dict[Unit, int] = {"share": 1, "tokens": 0, "characters": 0, "reward": 3, "slope": 5}
UNITS: dict[Unit, str] = {
    "share": "%",
    "tokens": "tokens",
    "characters": "characters",
    "reward": "reward",
    "slope": "reward / token",
}
"""What columns are in."""
LIMITED = "*"
"""Behind a number that is not the benchmark's full one."""


def number(value: float, unit: Unit) -> str:
    return f"{100 * value if unit == 'share' else value:.{PLACES[unit]}f}"


def value(cell: Cell) -> str:
    mark = LIMITED if is_trial(cell.result.conditions) else ""
    return number(cell.score.value, cell.score.unit) + mark


def published_value(cell: Cell) -> str:
    """What was published for its row; empty where nothing was."""
    if cell.published is None:
        return ""
    places = 0 if cell.score.unit == "tokens" else 2
    other = "" if cell.same_measure else ", other tokens" if cell.score.unit == "tokens" else ", another judge"
    return f"published {cell.published:.{places}f}{other}"


def bracketed(score: Score) -> str:
    """Its interval; empty where there is none."""
    found = bounds(score)
    return "" if found is None else f"[{number(found[0], score.unit)}, {number(found[1], score.unit)}]"


def change(gap: Difference, unit: Unit) -> str:
    """A difference with sign and interval; empty where there is none."""
    if gap.value is None:
        return ""
    places, scale = PLACES[unit], 100 if unit == "share" else 1
    text = f"{scale * gap.value:+.{places}f}"
    if gap.low is None or gap.high is None:
        return text
    return f"{text} [{scale * gap.low:+.{places}f}, {scale * gap.high:+.{places}f}]"


def conditions(found: Comparison) -> list[tuple[str, str, list[str]]]:
    """Of each task: its name, the rows it was run for, and under which conditions; one entry for each that differ."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in found.rows:
        for task, result in {cell.result.task: cell.result for cell in row.cells.values()}.items():
            groups.setdefault((task, tuple(described(result.conditions))), []).append(row.name)
    return [(task, ", ".join(rows), list(lines)) for (task, lines), rows in groups.items()]


def described(about: Conditions) -> list[str]:
    """The conditions of a result that people want to know, a short text each."""
    samples = f"{about.limit} of {about.total} samples" if is_trial(about) else f"all {about.total} samples"
    found = [samples, f"{about.shots}-shot ({about.shots_form})" if about.shots else "0-shot"]
    if about.card_shots is not None and about.card_shots != about.shots:
        found[-1] += f", called {about.card_shots}-shot by the card"
    found.append(f"through {about.route}")
    optional = {"chat template": about.template, "max_tokens": about.max_tokens, "dtype": about.dtype}
    found += [f"{name} {each}" for name, each in optional.items() if each is not None]
    found += [f"{name} {each}" for name, each in about.sampling.items() if each is not None and name != "seed"]
    found.append(f"seed {about.seed}")
    if about.judge is not None:
        found.append(f"judge {about.judge.name}, preset {about.judge.preset}{_spread(about.judge.repeat_spread)}")
    return found + [f"{package} {version}" for package, version in _harness(about)]


def _spread(spread: float | None) -> str:
    measured = "not measured" if spread is None else f"{100 * spread:.1f} points"
    return f", spread over repeats {measured}"


def _harness(about: Conditions) -> Sequence[tuple[str, str]]:
    return [(name, about.packages[name]) for name in HARNESSES if name in about.packages]
