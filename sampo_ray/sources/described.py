"""A source that is refused: what its rows have, in words, and how a user says which column is what."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.reading import Kind, NotFound, choose, said
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts
from sampo_ray.sources.table import is_message

MOST = 24
"""Columns that a message names."""
EMPTY = "always empty"


@dataclass(frozen=True)
class Entry:
    """One source of a run, the `index`-th of `count` of data.train or data.prompts."""

    source: str
    index: int = 0
    count: int = 1

    def override(self, columns: Mapping[str, str]) -> str:
        """What names columns of this source on the command line, quoted for a shell."""
        each = ["{}"] * self.count
        each[self.index] = f"{{{', '.join(f'{name}: {value}' for name, value in columns.items())}}}"
        return f"'data.columns={each[0] if self.count == 1 else '[' + ', '.join(each) + ']'}'"


def unread(entry: Entry, kind: Kind, records: Sequence[Record], why: NotFound, given: Columns) -> DataError:
    """The error for a source in whose rows a column that is needed was not found."""
    example, alone = "", ""
    if why.missing:
        prompt = _prompt(records, given) if kind == "pairs" else None
        fields = ["answers", "verdict"] if "verdict" in why.missing else ["prompt", *why.missing]
        named = {field: prompt if field == "prompt" and prompt else "..." for field in fields}
        example = f", as in {entry.override(named)}"
        alone = ". Prompts alone are for rounds.mode=online and data.prompts" if prompt and "chosen" in named else ""
    return DataError(f"data source {entry.source!r}: {why}{example}. Its rows have {described(records)}{alone}")


def unusable(entry: Entry, records: Sequence[Record], columns: Columns | None, counts: Counts) -> DataError:
    """The error for a source of whose first rows none can be used, read as `columns` says."""
    if columns is None:
        return DataError(f"data source {entry.source!r}: holds no rows; name another")
    return DataError(
        f"data source {entry.source!r}: no usable row among the first {counts.rows:,}; dropped: {dropped(counts)}; "
        f"{said(columns)}. Its rows have {described(records)}. docs/data.md has the reasons, and how to name "
        "columns"
    )


def dropped(counts: Counts) -> str:
    """The reasons for which rows are dropped, each with how often, and where first."""
    return ", ".join(f"{reason} ({n:,}, first at {counts.first[reason]})" for reason, n in counts.dropped.most_common())


def described(records: Iterable[Record]) -> str:
    """The columns of some rows, each with what it holds: `question (text), turns (list of turns), score (number)`."""
    kinds: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in _columns(record.values):
            kinds.setdefault(name, {}).setdefault(_kind(value))
    named = [
        f"{name} ({' or '.join(kind for kind in known if kind != EMPTY) or EMPTY})" for name, known in kinds.items()
    ]
    return ", ".join(named[:MOST]) + (f" and {len(named) - MOST} more" if len(named) > MOST else "")


def _prompt(records: Sequence[Record], given: Columns) -> str | None:
    try:
        return choose(records, "prompts", Columns(**given.model_dump(include={"prompt"}))).prompt
    except DataError:
        return None


def _columns(values: Mapping[str, object], inside: str = "") -> Iterator[tuple[str, object]]:
    """Columns, and what is in them by its path; a turn is not taken apart."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and not inside and not is_message(value):
            yield from _columns(value, f"{name}.")
        else:
            yield f"{inside}{name}", value


def _kind(value: object) -> str:
    if value is None or value in ("", [], {}):
        return EMPTY
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str | int | float):
        return "text" if isinstance(value, str) else "number"
    if isinstance(value, Mapping):
        return "a turn" if is_message(value) else "an object"
    return _kind_of_list(value) if isinstance(value, list) else type(value).__name__


def _kind_of_list(values: Sequence[object]) -> str:
    first = next((value for value in values if value is not None), None)
    if isinstance(first, Mapping) and not is_message(first):
        return f"list of objects with {', '.join(map(str, first))}"
    plural = {"text": "texts", "number": "numbers", "a turn": "turns"}
    return f"list of {plural.get(_kind(first), 'lists' if isinstance(first, list) else 'values')}"
