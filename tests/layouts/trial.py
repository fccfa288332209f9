"""A layout's trial: its rows as a file, what is read from it, and whether that is right."""

from __future__ import annotations

import csv
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.rows import Counts, Kind, read_rows
from tests.layouts.specs import Anything, Either, Expected, Fields, Layout, Refused

KINDS: tuple[Kind, Kind] = ("pairs", "prompts")


@dataclasses.dataclass
class Read:
    """What came of reading a file: rows, and where there are none, why; `dropped` also where there are."""

    rows: list[Any]
    said: str = ""
    dropped: str = ""
    tools: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    """A kind of a layout: `right`, `refused` or `WRONG`; `expected`: whether that is what should come of it."""

    layout: Layout
    kind: Kind
    verdict: str
    said: str
    expected: bool


def try_layout(layout: Layout) -> Iterator[Result]:
    """Both kinds of a layout, from one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(layout.rows, layout.container, Path(folder))
        for kind in KINDS:
            if isinstance(layout.pairs if kind == "pairs" else layout.prompts, Anything):
                continue
            yield judged(layout, kind, read(path, kind, layout.columns))


def read(path: Path, kind: Kind, columns: Fields | None = None) -> Read:
    """What is read from a file; what an error says, and the reasons that rows are dropped for, where there is none."""
    counts = Counts()
    try:
        rows = list(read_rows(str(path), kind, counts, Columns(**(columns or {}))))
    except DataError as error:
        return Read([], str(error).replace(str(path.parent) + "/", ""))
    dropped = ", ".join(f"{why}: {count}" for why, count in counts.dropped.items())
    tools = [row.tools for row in rows]
    if kind == "prompts":
        return Read([row.prompt for row in rows], dropped, dropped, tools)
    return Read([_pair(row) for row in rows], dropped, dropped, tools)


def _pair(row: Any) -> Any:
    """(turns, chosen, rejected); an answer with more than a text as its message."""
    answers = [side["content"] if set(side) == {"role", "content"} else side for side in (row.chosen, row.rejected)]
    return (row.prompt, *answers)


def judged(layout: Layout, kind: Kind, found: Read) -> Result:
    """The verdict: rows that are read must be those that are expected, with their tools."""
    wanted = layout.pairs if kind == "pairs" else layout.prompts
    choices = wanted.choices if isinstance(wanted, Either) else (wanted,)
    if not found.rows:
        expected = any(isinstance(each, Refused) and each.why in found.said for each in choices) or bool(layout.tools)
        return Result(layout, kind, "refused", found.said, expected)
    lists = [each for each in choices if not isinstance(each, Refused)]
    with_tools = layout.tools is None or all(_bare(tools) == _bare(layout.tools) for tools in found.tools)
    if with_tools and any(_same(each, found.rows, kind) for each in lists):
        return Result(layout, kind, "right", found.dropped, True)
    if with_tools and any(all(_known(row, each) for row in found.rows) for each in lists):
        return Result(layout, kind, "refused", f"{len(found.rows)} rows read; {found.dropped}", False)
    lost = "" if with_tools else f"tools {found.tools[0]}; "
    return Result(layout, kind, "WRONG", f"{lost}read {json.dumps(found.rows, ensure_ascii=False)[:600]}", False)


def _bare(tools: Sequence[Fields] | None) -> list[Any]:
    """The functions of tools, with the wrapping of OpenAI's format or without."""
    return [tool.get("function", tool) for tool in tools or []]


def _same(wanted: Expected, found: Sequence[Any], kind: Kind) -> bool:
    """Whether these rows are those; the same prompt may be read once or more."""
    ours, theirs = [_plain(each) for each in found], [_plain(each) for each in wanted]
    return ours == theirs if kind == "pairs" else set(ours) == set(theirs)


def _known(row: Any, wanted: Expected) -> bool:
    return _plain(row) in {_plain(each) for each in wanted}


def _plain(row: Any) -> str:
    """A row as text to compare; blanks around answers are let pass."""
    if isinstance(row, list):
        return json.dumps(row, sort_keys=True)
    prompt, *answers = row
    return json.dumps([prompt, [side.strip() if isinstance(side, str) else side for side in answers]], sort_keys=True)


def written(rows: Sequence[Fields], container: str, folder: Path) -> Path:
    """The rows as a file of that kind."""
    path = folder / f"rows.{'json' if container == 'json1' else container}"
    if container in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines = csv.DictWriter(file, names, delimiter="\t" if container == "tsv" else ",")
            lines.writeheader()
            lines.writerows(rows)
    elif container == "parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows]), path)
    elif container == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps([*rows], indent=2 if container == "json" else None))
    return path
