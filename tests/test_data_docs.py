"""docs/data.md: its table is that of the layouts, and its examples are read as it says.

`python -m tests.test_data_docs` writes the table anew.
"""

import json
import re
from pathlib import Path

import pytest

from sampo_ray.config.run import load_config
from sampo_ray.sources import answers, conversations, layouts, rows, unusable, verdicts
from sampo_ray.sources.described import Entry
from sampo_ray.sources.probing import probe
from sampo_ray.sources.unfolding import FORMS

FILE = Path(__file__).parents[1] / "docs" / "data.md"
PAGE = FILE.read_text()
ROWS = {
    "a prompt: text, or turns": layouts.PROMPTS,
    "turns that are a prompt, or go on with an answer": layouts.CONVERSATIONS,
    "earlier turns; the prompt where there is no other": layouts.HISTORIES,
    "a system prompt": layouts.SYSTEMS,
    "tools": layouts.TOOLS,
    "prompts that go on with the text of an `input` or a `context`": layouts.INSTRUCTIONS_WITH_INPUT,
    "the better answer and the worse one": [f"{one} / {other}" for one, other in layouts.BETTER_AND_WORSE],
    "columns with one of these words": layouts.PARTS_OF_PAIRS,
    "other pairs of columns": [f"{one} / {other}" for one, other in layouts.PAIRS],
    "two or more answers, with a, b, 0, 1, 2, left, right, ... for {}": layouts.PARTS_OF_ANSWERS,
    "which of them is better": layouts.VERDICTS,
    "the same, one column for each": layouts.FLAGS,
    "a list of answers": layouts.LISTS,
    "where an element of it has its text": layouts.TEXTS,
    "its score": layouts.ELEMENT_SCORES,
    "its rank": layouts.ELEMENT_RANKS,
    "lists of scores beside it": layouts.LIST_SCORES,
    "lists of ranks beside it": layouts.LIST_RANKS,
    "scores in columns of their own, as `score_a` or `response_a_score`": layouts.SCORES,
    "ranks in columns of their own": layouts.RANKS,
    "whole forms, see below": FORMS,
}


def table() -> str:
    """The table of the page."""
    rows = [f"| {what} | {', '.join(f'`{name}`' for name in names)} |" for what, names in ROWS.items()]
    return "\n".join(["| what | names |", "| --- | --- |", *rows])


def examples() -> list[tuple[str, str]]:
    """The rows of the page that are followed by a `data.columns` for them, and that."""
    found = re.findall(r"```json\n(.+?)\n```\n\n    sampo train .*('data\.columns=.+?')", PAGE)
    return [(row, override.strip("'")) for row, override in found]


def test_the_table_is_that_of_the_layouts() -> None:
    assert table() in PAGE, "run python -m tests.test_data_docs"


@pytest.mark.parametrize(("row", "override"), examples())
def test_an_example_is_read_as_the_page_says(row, override, tmp_path) -> None:
    (tmp_path / "row.jsonl").write_text(row)
    columns = load_config(
        {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}}, [override]
    ).data.columns
    [read] = probe(Entry(str(tmp_path / "row.jsonl")), "pairs", columns).rows
    assert (read.chosen["content"], read.rejected["content"]) == ("Ada Quill, at dusk.", "Someone.")
    assert read.prompt[-1]["content"] == "Who lights the lamp?"
    assert json.loads(row).keys() & {"house"} == set() or read.prompt[0]["role"] == "system"


def test_the_page_has_examples() -> None:
    assert len(examples()) >= 3


def test_every_reason_for_which_a_row_is_dropped_is_explained() -> None:
    page = " ".join((FILE.parent / "troubleshooting.md").read_text().split())
    modules = (answers, conversations, rows, unusable, verdicts)
    reasons = {value for each in modules for name, value in vars(each).items() if name.isupper() and _is_reason(value)}
    assert len(reasons) > 30
    assert not {reason for reason in reasons if f"``{reason}``" not in page}


def _is_reason(value: object) -> bool:
    return isinstance(value, str) and " " in value


if __name__ == "__main__":
    FILE.write_text(re.sub(r"\| what \| names \|\n(\|.*\n)+", lambda _: f"{table()}\n", PAGE))
