"""Runs beside each other: rows of methods, columns of scores, differences to the base, what limits them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from sampo_ray.evaluation.differences import Difference, difference, lengths, not_compared, read_samples
from sampo_ray.evaluation.published import published
from sampo_ray.evaluation.records import Conditions, Score, TaskResult
from sampo_ray.evaluation.subjects import BASE, Evaluated, Results
from sampo_ray.evaluation.tasks import TASKS, Column
from sampo_ray.run.storage import Place

OFFICIAL = "length_controlled_winrate"
"""This name, without a judge behind it, is of alpaca_eval's own annotator."""
LLAMA3_TOKENS = "tokens,llama3"


@dataclass(frozen=True)
class Cell:
    """A score of a row."""

    root: Place
    result: TaskResult
    score: Score
    published: float | None
    """Percent, or tokens."""
    same_measure: bool
    """Whether what was published was measured as this score was."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row's answers in a task."""

    task: str
    count: int
    mean: float
    median: float
    nine_tenths: float
    cut: int
    empty: int


@dataclass(frozen=True)
class Row:
    name: str
    about: str
    """Which version of which run."""
    model: str
    cells: Mapping[str, Cell]
    """By title of the column."""
    differences: Mapping[str, Difference]
    """To the first row, by title."""
    lengths: tuple[Lengths, ...]


@dataclass(frozen=True)
class Point:
    label: str
    tokens: Score
    score: Score | None
    """None: of the base, whose win rate against itself is one half."""


@dataclass(frozen=True)
class Curve:
    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Figure:
    """Win rate against mean tokens over the rounds of each run."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Comparison:
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    against: str
    """The row that the others' differences are to: the base, or the first run where no base was evaluated."""
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    published: bool
    """Whether all rows start from the model that the published rows start from."""


def compare(read: Sequence[Results]) -> Comparison:
    """One row for the base, where any run has its results, and one for each run."""
    base_of: dict[str, tuple[Place, TaskResult]] = {}
    for each in reversed(read):
        for task, result in (each.base.results if each.base else {}).items():
            base_of[task] = (each.place, result)
    rows = list[Row]()
    if base_of:
        cells = {t: c for root, each in base_of.values() for t, c in _cells(root, each, BASE).items()}
        model = next(iter(base_of.values()))[1].model
        rows.append(Row(BASE, f"{model}, version 0", model, cells, {}, tuple(_lengths(base_of.values()))))
    for each in read:
        if each.shown is not None and each.shown.version != 0:
            rows.append(_row(each, each.shown, rows[0] if rows else None))
    titles = [column for task in TASKS.values() for column in task.columns]
    columns = tuple(column for column in titles if any(column.title in row.cells for row in rows))
    of_card = all(published(row.model, BASE) for row in rows)
    figures, notes = tuple(_figures(read)), tuple(_notes(read, rows))
    return Comparison(columns, tuple(rows), rows[0].name, figures, notes, of_card)


def _row(of: Results, version: Evaluated, first: Row | None) -> Row:
    cells = {t: c for each in version.results.values() for t, c in _cells(of.place, each, of.method).items()}
    gaps = {}
    for title, cell in cells.items():
        if first is None or (other := first.cells.get(title)) is None:
            continue
        bases = {each.model for each in (cell.result, other.result) if each.version is not None}
        if len(bases) > 1:
            gaps[title] = not_compared(f"base models: {of.model} and {first.model}")
        else:
            gaps[title] = difference((cell.root, cell.result), (other.root, other.result), cell.score, other.score)
    number = version.label if version.version is None else f"{version.label} (version {version.version})"
    found = tuple(_lengths([(of.place, each) for each in version.results.values()]))
    return Row(of.name, f"{of.place.name}, {number}", of.model, cells, gaps, found)


def _cells(root: Place, result: TaskResult, method: str | None) -> dict[str, Cell]:
    task, known = TASKS.get(result.task), published(result.model, method)
    cells = {}
    for column in task.columns if task else ():
        if (score := column.of(result)) is not None:
            cells[column.title] = Cell(root, result, score, known.get(column.title), _as_published(result, score))
    return cells


def _as_published(result: TaskResult, score: Score) -> bool:
    """Whether a score is the number that the card has: of the official annotator, and in Llama 3's tokens."""
    if result.task != "alpaca_eval":
        return True
    return score.name == LLAMA3_TOKENS if score.unit == "tokens" else result.score(OFFICIAL) is not None


def _lengths(of: Iterable[tuple[Place, TaskResult]]) -> Iterator[Lengths]:
    for root, result in of:
        tokens = sorted(lengths(read_samples(root, result)))
        if len(tokens) > 1:
            cuts, mean = quantiles(tokens, n=10, method="inclusive"), sum(tokens) / len(tokens)
            about = result.conditions
            yield Lengths(result.task, len(tokens), mean, cuts[4], cuts[8], about.cut, about.empty)


PAIRS = (
    ("alpaca_eval", "LC AlpacaEval2", "tokens", "AlpacaEval 2, length-controlled win rate"),
    ("alpaca_eval", "AlpacaEval2", "tokens", "AlpacaEval 2, win rate"),
    ("probe", "win rate against base", "probe tokens", "Probe prompts, win rate against base"),
)
"""Task, column of the win rate, column of the tokens, title."""


def _figures(read: Sequence[Results]) -> Iterator[Figure]:
    for task, rate, tokens, title in PAIRS:
        columns = {column.title: column for column in TASKS[task].columns}
        if rate not in columns or tokens not in columns:
            continue
        curves = []
        for each in _runs(read):
            versions = [*([each.base] if each.base else []), *each.versions]
            points = tuple(_points(versions, task, columns[rate], columns[tokens]))
            if any(point.score is not None for point in points):
                curves.append(Curve(each.name, points))
        if curves:
            yield Figure(title, tuple(curves))


def _runs(read: Sequence[Results]) -> list[Results]:
    """Each run once, of which several versions may be rows."""
    return list({each.place.url: each for each in reversed(read)}.values())[::-1]


def _points(versions: Sequence[Evaluated], task: str, rate: Column, tokens: Column) -> Iterator[Point]:
    for version in versions:
        result = version.results.get(task)
        if result is None or (length := tokens.of(result)) is None:
            continue
        score = rate.of(result)
        if score is not None or (version.version == 0 and task == "probe"):
            yield Point(version.label, length, score)


def _notes(read: Sequence[Results], rows: Sequence[Row]) -> Iterator[str]:
    rows_of: dict[str, list[str]] = {}
    for row in rows:
        for task, result in {cell.result.task: cell.result for cell in row.cells.values()}.items():
            for note in limits(result):
                rows_of.setdefault(f"{task}: {note}", []).append(row.name)
    for note, names in rows_of.items():
        yield note if len(names) == len(rows) > 1 else f"{note} ({', '.join(names)})"
    for each in read:
        have = {task for version in each.versions for task in version.results}
        for task in sorted(have - {*(each.shown.results if each.shown else {})}):
            yield f"{each.name}: {task} was evaluated of other versions than the one that is shown"
    if len(models := {row.model for row in rows}) > 1:
        yield f"the runs start from different models: {', '.join(sorted(models))}"


def is_trial(about: Conditions) -> bool:
    """Whether not all samples of the benchmark were asked."""
    return about.limit is not None and about.limit < about.total


def limits(result: TaskResult) -> Iterator[str]:
    """What keeps a result from being the benchmark's full number."""
    about = result.conditions
    if is_trial(about):
        yield f"{about.limit} of {about.total} samples: a trial, not the benchmark's number"
    if about.judge is not None and about.judge.repeat_spread is None:
        yield "the judge's spread over repeats was not measured"
    lost = [(about.failed, "failed"), (about.empty, "empty"), (about.cut, "cut at max_tokens")]
    if any(count for count, _ in lost):
        yield "answers: " + ", ".join(f"{count} {what}" for count, what in lost if count)
    yield from about.notes
