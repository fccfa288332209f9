"""Changes to a file that do not change what its rows say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from tests.layouts.specs import Fields, Layout

METADATA: Fields = {"language": "en", "num_turns": 1, "split": "train", "__index_level_0__": 3, "annotator": None}
NOTHING: Fields = {"system": None, "history": None, "tools": None, "images": None, "context": None, "input": None}


def _each(change: Callable[[Fields], Fields], container: str | None = None) -> Callable[[Layout], Layout]:
    def varied(layout: Layout) -> Layout:
        rows = [change(row) for row in layout.rows]
        return dataclasses.replace(layout, rows=rows, container=container or layout.container)

    return varied


def _cells(row: Fields) -> Fields:
    """A row as a table of text has it: lists and objects as JSON."""
    return {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}


VARIATIONS: dict[str, Callable[[Layout], Layout]] = {
    "a JSON array": _each(dict, "json"),
    "Parquet": _each(dict, "parquet"),
    "CSV, JSON in its cells": _each(_cells, "csv"),
    "JSON in text": _each(_cells, "jsonl"),
    "other columns beside": _each(lambda row: {**METADATA, **row}),
    "columns turned around": _each(lambda row: dict(reversed(row.items()))),
    "columns of null": _each(lambda row: {**NOTHING, **row}),
    "columns of empty text": _each(lambda row: {**dict.fromkeys(NOTHING, ""), **row}),
    "columns of NaN": _each(lambda row: {**dict.fromkeys(NOTHING, float("nan")), **row}),
    "columns of empty lists": _each(lambda row: {"history": [], "tools": [], "images": [], **row}),
}
