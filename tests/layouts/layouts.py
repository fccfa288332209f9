"""All layouts that are tried: ours, and those of the shared folder where it is there."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.layouts.exports import EXPORTS, TEMPLATED
from tests.layouts.lists import LISTS
from tests.layouts.pairs import TEXT
from tests.layouts.prompts import PROMPTS, TOOLS
from tests.layouts.refusals import LOST, MORE, OPEN
from tests.layouts.specs import Anything, Either, Expected, Layout, Refused
from tests.layouts.turns import TURNS
from tests.layouts.verdicts import VERDICTS

LAYOUTS: tuple[Layout, ...] = (
    *TEXT,
    *TURNS,
    *VERDICTS,
    *LISTS,
    *EXPORTS,
    *TEMPLATED,
    *PROMPTS,
    *TOOLS,
    *LOST,
    *OPEN,
    *MORE,
)


def named(names: Iterable[str], among: Iterable[Layout] = LAYOUTS) -> tuple[Layout, ...]:
    """The layouts whose name or source holds one of `names`; all for none."""
    wanted = [name.lower() for name in names]
    return tuple(
        each for each in among if not wanted or any(name in f"{each.name} {each.source}".lower() for name in wanted)
    )


def layouts_in(folder: Path) -> Iterator[Layout]:
    """The layouts that a folder has as JSON files with rows, format, pairs and prompts."""
    for path in sorted(folder.glob("*.json")):
        given = json.loads(path.read_text())
        pairs = _with_tools(given["rows"]) if given["pairs"] == [["TOOLS"]] else _expected(given["pairs"])
        prompts = _expected(given["prompts"])
        if given["prompts"] is None and given["pairs"] is not None:  # prompts of pairs, not asked for
            prompts = Anything() if isinstance(pairs, Refused | Either) else Either((_prompts(pairs), Refused()))
        tools = next((row["tools"] for row in given["rows"] if row.get("tools")), None)
        yield Layout(path.stem, given["source"], given["rows"], pairs, prompts, given["format"], tools)


def _expected(given: Any) -> Expected:
    if given is None or any(isinstance(each, list) and isinstance(each[0], str) and len(each) == 1 for each in given):
        return Refused()
    return [_pair(each) if isinstance(each[0], list | str) else each for each in given]


def _with_tools(rows: list[Any]) -> Expected:
    """What is refused for its tools may be read with them, since the rows have the form that templates take."""
    answers = [[each["content"] or each for each in (row["chosen"][-1], row["rejected"][-1])] for row in rows]
    return Either((Refused(), [(row["prompt"], *both) for row, both in zip(rows, answers, strict=True)]))


def _pair(given: list[Any]) -> Any:
    """A pair; a prompt in text goes on in the answer, so it is a turn of the user."""
    prompt, chosen, rejected = given
    return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, chosen, rejected)


def _prompts(pairs: Any) -> Expected:
    return [prompt for prompt, _, _ in pairs]
