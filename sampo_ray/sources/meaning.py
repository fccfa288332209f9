"""How the verdicts of a source are meant."""

from collections.abc import Mapping, Sequence

from sampo_ray.config.columns import Columns, Means
from sampo_ray.sources.answers import answers_of, paths_of
from sampo_ray.sources.paths import at
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import (
    OTHER_VERDICT,
    Sides,
    key_of,
    marks_of,
    number_of,
    order_names,
    says_nothing,
    short_of,
    sides_of,
)

KNOWN: dict[str, Means] = {
    "better_response_id": "index",  # PKU-SafeRLHF
    "safer_response_id": "index",
    "choice": "index",  # learning to summarize; Vertex AI's human feedback
    "overall_preference": "sign",  # HelpSteer3
    "preference_strength": "sign",  # HelpSteer2
    "preference": "number",  # AlpacaEval, AlpacaFarm
    "labels": "first",  # SHP
}
"""How the verdicts in columns of public data are meant, where their values allow it."""


class Unclear(Exception):
    """Verdicts that can be meant in several ways, or in none; the message says what to write in data.columns."""


def means_of(rows: Sequence[Mapping[str, object]], columns: Columns) -> Means:
    """How the one column `columns.verdict` is meant: from its values in `rows` and from its name. Raises Unclear."""
    column, paths = paths_of(columns.verdict)[0], paths_of(columns.answers)
    found = [at(row, column) for row in rows]
    values = [each for value in found for each in (value if isinstance(value, list) else [value])]
    numbers = {number for value in values if (number := number_of(value)) is not None}
    texts = [v for v in values if isinstance(v, str) and number_of(v) is None and not says_nothing(v)]
    if texts:
        return _named(rows, texts, columns)
    if not numbers:
        raise Unclear(f"column {column!r} holds no verdicts; name another, as in data.columns={{verdict: winner}}")
    count = max((len(answers_of(row, columns)[0]) for row in rows), default=2)
    key = key_of(column.rpartition(".")[2])
    known: Means | None = "index" if key.endswith(("_index", "_idx")) else KNOWN.get(key)
    if known and _fits(known, numbers, count):
        return known
    return _of_numbers(column, numbers, paths if len(paths) > 1 else (), count)


def _of_numbers(column: str, numbers: set[float], paths: Sequence[str], count: int) -> Means:
    marks = marks_of(paths)
    if marks and {f"{number:g}" for number in numbers} <= set(marks):
        return "name"  # 0 and 1 of response_0 and response_1
    side = Sides(order_names(count) | {mark: n for n, mark in enumerate(marks)}).of.get(short_of(key_of(column)))
    if side is not None and numbers <= {0, 1} and count == 2:
        return "index" if side else "first"  # is_b_better: true is the second, as with an index
    low, high = min(numbers), max(numbers)
    if low >= 1 and high == count:
        return "number"
    if count > 2 and low == 0 and high < count:
        return "index"
    raise Unclear(_how_to_say(column, numbers, paths))


def _named(rows: Sequence[Mapping[str, object]], texts: Sequence[str], columns: Columns) -> Means:
    column, paths = paths_of(columns.verdict)[0], paths_of(columns.answers)
    for row in rows:
        verdict = at(row, column)
        sides = sides_of(columns, row, *answers_of(row, columns))
        if any(_names(sides, each) for each in (verdict if isinstance(verdict, list) else [verdict])):
            return "name"
    shown = ", ".join(repr(text) for text in list(dict.fromkeys(texts))[:3])
    raise Unclear(
        f"column {column!r} holds {shown}, which names none of {', '.join(paths)}; "
        "name the column that does, as in data.columns={verdict: winner}"
    )


def _names(sides: Sides, verdict: object) -> bool:
    try:
        sides.named(verdict)
    except Unusable as reason:
        return str(reason) != OTHER_VERDICT
    return True


def _fits(means: Means, numbers: set[float], count: int) -> bool:
    low, high = min(numbers), max(numbers)
    if means == "number":
        return (low >= 1 or (low == 0 and high > 1)) and high <= count
    return means == "sign" or (low >= 0 and high <= (1 if means == "first" else count - 1))


def _how_to_say(column: str, numbers: set[float], paths: Sequence[str]) -> str:
    shown = ", ".join(f"{number:g}" for number in sorted(numbers)[:5])
    first = paths[0] if paths else "the first answer"
    if min(numbers) < 0:
        return (
            f"column {column!r} holds {shown}; write means: sign in data.columns if a number below 0 is for {first}, "
            "and name the answers in the other order if it is against it"
        )
    return (
        f"column {column!r} holds {shown}; write in data.columns means: index if 0 stands for {first}, means: number "
        f"if 1 does and 2 for the next, means: first if 1 (or true) does and 0 for the other"
    )
