"""Layouts of public data: each is read right or refused, and none is read wrong."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from sampo_ray.sources.rows import Kind
from tests.layouts.layouts import LAYOUTS, layouts_in
from tests.layouts.specs import BAD, GOOD, ONE, QUESTION, SYSTEM, TOLD, Fields, Layout, user
from tests.layouts.trial import Read, Result, read, try_layout, written
from tests.layouts.variations import VARIATIONS, differences


def results_of(layouts: Iterable[Layout]) -> list[Result]:
    return [result for layout in layouts for result in try_layout(layout)]


def lines(results: Iterable[Result]) -> list[str]:
    return [f"{each.layout.name}, {each.kind}: {each.verdict}: {each.said}" for each in results]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return results_of(LAYOUTS)


def test_each_layout_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(each.name for each in LAYOUTS).items() if count > 1] == []


def test_no_layout_is_read_wrong(results: list[Result]) -> None:
    assert lines(each for each in results if each.verdict == "WRONG") == []


def test_each_layout_is_read_or_refused_as_it_should_be(results: list[Result]) -> None:
    assert lines(each for each in results if not each.expected) == []


def test_the_layouts_of_the_shared_folder_are_read_as_they_should_be(shared: Path) -> None:
    found = results_of(layouts_in(shared / "data/layouts"))
    assert lines(each for each in found if not each.expected) == []


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_change_that_says_the_same_is_read_the_same(results: list[Result], name: str) -> None:
    """Each layout has every third change here; `make layouts` tries all."""
    read = {(each.layout.name, each.kind) for each in results if each.verdict == "right"}
    some = LAYOUTS[[*VARIATIONS].index(name) % 3 :: 3]
    assert lines(differences(VARIATIONS[name], some, read)) == []


PAIR = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}


def read_of(folder: Path, rows: list[Fields], kind: Kind = "pairs") -> Read:
    return read(written(rows, "jsonl", folder), kind)


@pytest.mark.parametrize(
    "late",
    [
        {"system": SYSTEM},
        {"history": [["Who?", "Ada."]]},
        {"images": ["light.png"]},
        {"tools": [{"type": "function", "function": {"name": "steps"}}]},
        {"chat_template_kwargs": {"custom_instructions": SYSTEM}},
    ],
    ids=lambda late: next(iter(late)),
)
def test_what_changes_meaning_is_not_lost_where_it_comes_after_the_rows_that_are_probed(
    tmp_path: Path, late: Fields
) -> None:
    found = read_of(tmp_path, [PAIR] * 1500 + [{**PAIR, **late}] + [PAIR] * 10)
    assert (found.rows == [ONE] * 1510 and found.dropped) or found.rows == [ONE] * 1500 + [TOLD] + [ONE] * 10


def test_a_column_of_null_through_all_the_rows_that_are_probed_is_read_where_it_is_filled(tmp_path: Path) -> None:
    found = read_of(tmp_path, [{**PAIR, "system": None}] * 1500 + [{**PAIR, "system": SYSTEM}])
    assert found.rows in ([ONE] * 1500 + [TOLD], [ONE] * 1500)
    assert len(found.rows) == 1501 or found.dropped


def test_bad_rows_in_front_are_counted_and_those_behind_them_are_read(tmp_path: Path) -> None:
    found = read_of(tmp_path, [{"note": "nothing"}] * 900 + [{**PAIR, "rejected": None}] * 300 + [PAIR] * 3)
    assert found.rows == [ONE] * 3
    assert found.dropped


def test_large_cells_many_columns_and_other_values_are_read(tmp_path: Path) -> None:
    large = "step " * 1_000_000
    columns = {f"column {number}": number for number in range(5000)}
    found = read_of(
        tmp_path, [{**PAIR, "chosen": large, **columns}, {**PAIR, "meta": {"when": "2024-02-29", "n": 1e400}}]
    )
    assert found.rows == [([user()], large, BAD), ONE]
