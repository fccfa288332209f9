"""Changes to a file that do not change what its rows say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator

import pyarrow as pa

from tests.layouts.specs import Fields, Layout
from tests.layouts.trial import Result, try_layout

TURN = {"role", "from"}
OTHER_IN_TEXT = (
    *("vertex", "nova", "kto of LLaMA-Factory", "oasst, two levels", "oasst, deleted and unranked"),
    "input beside messages",
)
"""Layouts that say something else as text: they are known by objects, numbers or nulls, and an input may be JSON."""
METADATA: Fields = {"language": "en", "num_turns": 1, "split": "train", "__index_level_0__": 3, "annotator": None}
NOTHING: Fields = {"system": None, "history": None, "tools": None, "images": None, "context": None}


def _are_turns(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, dict) and TURN & set(each) for each in value)
    )


def _each(change: Callable[[Fields], Fields], container: str | None = None) -> Callable[[Layout], Layout | None]:
    def varied(layout: Layout) -> Layout:
        rows = [change(row) for row in layout.rows]
        return dataclasses.replace(layout, rows=rows, container=container or layout.container)

    return varied


def _in_text(row: Fields) -> Fields:
    """A row whose turns are JSON in text."""
    return {name: json.dumps(value) if _are_turns(value) else value for name, value in row.items()}


def _as_table(layout: Layout) -> Layout | None:
    """A table of text has no lists or objects, but turns as JSON."""
    rows = [_in_text(row) for row in layout.rows]
    if layout.columns or any(isinstance(value, list | dict) and value for row in rows for value in row.values()):
        return None
    rows = [{name: "" if isinstance(value, list | dict) else value for name, value in row.items()} for row in rows]
    return dataclasses.replace(layout, rows=rows, container="csv")


def _with_nan(layout: Layout) -> Layout | None:
    rows = [{**dict.fromkeys(NOTHING, float("nan")), **row} for row in layout.rows]
    return None if layout.container in ("csv", "tsv") else dataclasses.replace(layout, rows=rows)


VARIATIONS: dict[str, Callable[[Layout], Layout | None]] = {
    "a JSON array": _each(dict, "json"),
    "Parquet": _each(dict, "parquet"),
    "CSV": _as_table,
    "turns as JSON in text": _each(_in_text),
    "other columns beside": _each(lambda row: {**METADATA, **row}),
    "columns turned around": _each(lambda row: dict(reversed(row.items()))),
    "columns of null": _each(lambda row: {**NOTHING, **row}),
    "columns of empty text": _each(lambda row: {**dict.fromkeys(NOTHING, ""), **row}),
    "columns of NaN": _with_nan,
    "columns of empty lists": _each(lambda row: {"history": [], "tools": [], "images": [], **row}),
}


def of_text(change: Callable[[Layout], Layout | None]) -> bool:
    """Whether a change makes text of what is none."""
    return change in (VARIATIONS["CSV"], VARIATIONS["turns as JSON in text"])


def differences(
    change: Callable[[Layout], Layout | None], layouts: Iterable[Layout], read: Collection[tuple[str, str]]
) -> Iterator[Result]:
    """What is read wrong after a change, or no longer read; `read`: names and kinds that are read right without it."""
    for layout in layouts:
        try:
            found = list(try_layout(changed)) if (changed := change(layout)) else []
        except (pa.ArrowException, UnicodeEncodeError):  # rows that no table can hold
            continue
        other = of_text(change) and layout.name in OTHER_IN_TEXT
        for each in found:
            lost = each.verdict == "refused" and (layout.name, each.kind) in read
            if not other and (lost or each.verdict == "WRONG"):
                yield each
