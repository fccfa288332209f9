"""How the columns of a source are found before a run: how far it is read, and what is said where they are not found."""

import itertools
import json
import re

import pytest

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.described import Entry, described
from sampo_ray.sources.probing import MOST, probe
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import PROBED

GOOD = {"question": "Who keeps the light?", "chosen": "Old Marrow does.", "rejected": "Nobody."}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def found(tmp_path, rows, kind="pairs", clock=lambda: 0.0, **given):
    return probe(Entry(write(tmp_path / "rows.jsonl", rows)), kind, Columns(**given), clock)


def refused(*arguments, **given):
    with pytest.raises(DataError) as error:
        found(*arguments, **given)
    return str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "chosen": None, "rejected": None},
        {**GOOD, "chosen": "", "rejected": ""},
        {"question": "Who keeps the light?"},
        {"note": "a header"},
        {},
    ],
)
def test_bad_rows_in_front_of_good_ones_refuse_no_file(tmp_path, bad):
    result = found(tmp_path, [bad] * (2 * PROBED) + [GOOD] * 3)
    assert (len(result.rows), result.skipped.rows) == (3, 2 * PROBED)
    assert (result.columns.prompt, result.columns.chosen) == ("question", "chosen")


def test_rows_that_cannot_be_used_are_counted_among_those_that_decide(tmp_path):
    result = found(tmp_path, [{**GOOD, "chosen": ""}, GOOD, GOOD])
    assert (result.counts.rows, result.counts.usable, result.skipped.rows) == (3, 2, 0)
    assert result.columns.complete


def test_a_source_is_given_up_after_many_records_or_seconds(tmp_path):
    reads = itertools.count()
    bad = [{"note": "x"}] * (3 * PROBED)
    assert "no columns are known to hold answers" in refused(tmp_path, [*bad, GOOD], clock=lambda: 30.0 * next(reads))
    assert next(reads) == 2, "the first lot took too long"
    assert "no columns are known" in refused(tmp_path, [{"note": "x"}] * MOST + [GOOD])


def test_a_column_that_is_given_may_be_met_late(tmp_path):
    late = {**GOOD, "house": "You keep a lighthouse."}
    result = found(tmp_path, [GOOD] * PROBED + [late], system="house")
    assert result.columns.system == "house"


def test_a_refusal_names_the_columns_and_a_way_to_name_them(tmp_path):
    row = {"question": "Why?", "reply": "So.", "score": 3, "tags": ["a"], "seen": True, "at": None, "by": {"name": "x"}}
    assert refused(tmp_path, [row]) == (
        f"data source '{tmp_path}/rows.jsonl': no columns are known to hold answers; name them in data.columns, as in "
        "'data.columns={prompt: question, chosen: ..., rejected: ...}'. Its rows have question (text), reply (text), "
        "score (number), tags (list of texts), seen (true or false), at (always empty), by.name (text). Prompts alone "
        "are for rounds.mode=online and data.prompts"
    )


def test_a_refusal_of_one_of_several_sources_says_columns_for_all(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Why?"}])
    with pytest.raises(
        DataError, match=r"'data\.columns=\[\{\}, \{prompt: question, chosen: \.\.\., rejected: \.\.\.\}\]'"
    ):
        probe(Entry(path, 1, 2), "pairs", Columns())


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([GOOD], {"prompt": "qestion"}, r"data\.columns\.prompt='qestion': no row has it; did you mean 'question'\?"),
        ([GOOD], {"system": "sytem"}, r"data\.columns\.system='sytem': no row has it"),
        (
            [{**GOOD, "q": None}],
            {"prompt": "q"},
            r"no usable row among the first 1; dropped: no prompt .*q \(always empty\)",
        ),
        ([{**GOOD, "chosen": ""}], {}, r"dropped: empty response \(1, first at .*rows\.jsonl:1\); read as: question"),
        ([{"a": "x", "b": "y", "question": "Why?"}], {"answers": ["a", "b"]}, r"\{answers: \.\.\., verdict: \.\.\.\}"),
        ([], {}, "holds no rows"),
    ],
)
def test_what_is_wrong_with_columns_is_said(tmp_path, rows, given, message):
    assert re.search(message, refused(tmp_path, rows, **given))


def test_turns_objects_and_mixed_columns_are_described():
    rows = [
        {
            "talk": [{"role": "user", "content": "a"}],
            "votes": [1, 2],
            "one": {"from": "human", "value": "a"},
            "mixed": 1,
        },
        {"mixed": "a", "answers": [{"text": "b", "rank": 1}], "empty": [], "pairs": [["a", "b"]]},
    ]
    assert described(Record("", "", row) for row in rows) == (
        "talk (list of turns), votes (list of numbers), one (a turn), mixed (number or text), "
        "answers (list of objects with text, rank), empty (always empty), pairs (list of lists)"
    )


def test_of_many_columns_some_are_named():
    assert described([Record("", "", {f"c{n}": n for n in range(30)})]).endswith("c23 (number) and 6 more")
