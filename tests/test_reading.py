"""How the columns of a source are found, completed, refused and said."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.described import Entry
from sampo_ray.sources.layouts import BETTER_AND_WORSE, PARTS_OF_PAIRS, PROMPTS, SYSTEMS
from sampo_ray.sources.probing import probe
from sampo_ray.sources.reading import Ambiguous, NotFound, choose, said
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts, rows_of
from sampo_ray.sources.unfolding import unfolded

ASK, GOOD, BAD = "Who mends the nets?", "The two brothers at the pier.", "Nobody."
PAIR = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}


def records(*rows):
    return [Record(f"a.jsonl:{n}", f"/a.jsonl:{n}", row) for n, row in enumerate(rows, start=1)]


def found(*rows, kind="pairs", **columns):
    """The columns that are chosen, without those that are not used."""
    chosen = choose(records(*rows), kind, Columns(**columns))
    assert chosen.complete
    return {name: value for name, value in chosen if value is not None}


def read(*rows, kind="pairs", **columns):
    """The rows as (turns, chosen, rejected), a turn being (first letter of the role, text); and what was dropped."""
    chosen, counts = choose(records(*rows), kind, Columns(**columns)), Counts()
    every = [
        (
            [(turn["role"][0], turn["content"]) for turn in row.prompt],
            *(side["content"] for side in (row.chosen, row.rejected) if side),
        )
        for row in rows_of(unfolded(records(*rows), chosen), kind, chosen, counts)
    ]
    return every, dict(counts.dropped)


ONE = ([([("u", ASK)], GOOD, BAD)], {})


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"Question": ASK, "Chosen": GOOD, "Rejected": BAD},
        {"instruction": ASK, "input": "", "chosenResponse": GOOD, "rejectedResponse": BAD},
        {"query": ASK, "response": GOOD, "rejected_response": BAD},
        {"question": ASK, "response_j": GOOD, "response_k": BAD, "qid": 3},
        {"row_idx": 0, "row": PAIR, "truncated_cells": []},
        {"prompt": ASK, "chosen": {"text": GOOD, "score": 2}, "rejected": {"text": BAD, "score": 1}},
        {"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner": "b"},
        {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "chosen": "a", "rejected": "b"},
        {"prompt": ASK, "answer_0": BAD, "answer_1": GOOD, "score_0": -1.0, "score_1": 1.0},
        {"history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_A": 9, "score_B": 2},
        {"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner_model_a": 0, "winner_model_b": 1},
        {"prompt": ASK, "completions": [{"response": BAD, "score": 1}, {"response": GOOD, "score": 4}]},
        {"prompt": ASK, "answers": [{"answer": BAD, "rank": 2}, {"answer": GOOD, "rank": 1}]},
        {"prompt": ASK, "generations": [BAD, GOOD], "ratings": [1, 5]},
        {"prompt": ASK, "output": [GOOD, BAD]},
        {"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}", "prompt": ASK},
    ],
)  # fmt: skip
def test_public_layouts_are_read_alike(row):
    rows, dropped = read(row)
    assert ([(turns, chosen.strip(), rejected.strip()) for turns, chosen, rejected in rows], dropped) == ONE


@given(
    st.sampled_from(PROMPTS),
    st.sampled_from(BETTER_AND_WORSE),
    st.sampled_from(PARTS_OF_PAIRS),
    st.sampled_from(SYSTEMS),
)
def test_names_of_prompts_pairs_and_systems_go_together(prompt, words, part, system):
    names = [part.format(word) for word in words]
    if len(names[0]) > 1:
        rows, dropped = read({prompt: ASK, names[0]: GOOD, names[1]: BAD, system: "Be brief."})
        assert (rows, dropped) == ([([("s", "Be brief."), ("u", ASK)], GOOD, BAD)], {})


def test_two_ways_that_read_other_pairs_are_refused_with_both_and_those_that_read_the_same_are_not():
    both = PAIR | {"response_a": GOOD, "response_b": BAD}
    assert found(both | {"winner": "a"}) == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    several = {"all_generated_responses": [BAD, "Guess.", GOOD], "all_rm_scores": [0, -1, 2]}
    assert read(PAIR | several) == ONE, "another of the worse answers is no contradiction"
    with pytest.raises(
        Ambiguous, match=r"chosen and rejected, .* response_a and response_b and winner.*data\.columns="
    ):
        found(both | {"winner": "b"})
    with pytest.raises(Ambiguous):
        found({"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "a", "score_a": 1, "score_b": 2})
    assert found(*[both | {"winner": "a"}] * 50, both | {"winner": "b"})["chosen"] == "chosen", "a slip"
    chosen = found(both | {"winner": "b"}, answers=("response_a", "response_b"), verdict="winner")
    assert chosen == {"prompt": "prompt", "answers": ("response_a", "response_b"), "verdict": "winner", "means": "name"}


def test_what_is_given_wins_and_the_rest_is_found():
    row = {"q": ASK, "sys": "Be brief.", "good": GOOD, "weak": BAD, "chosen": "c", "rejected": "r"}
    given = {"prompt": "q", "chosen": "good", "rejected": "weak"}
    assert found(row, **given) == given | {"system": "sys"}
    assert found(row, **given, system=None) == given | {"ignore": ("sys",)}
    assert read(row, **given, system=None) == ONE
    nested = {"x": {"ask": ASK}, "a": [{"t": GOOD}, {"t": BAD}], "marks": [2, 1]}
    assert read(nested, prompt="x.ask", answers="a", text="t", score="marks") == ONE
    assert found(PAIR | {"prompt": ""}, chosen="chosen") == {
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
    }


def test_a_given_path_that_no_row_has_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"data\.columns\.prompt='promt': no row has it; did you mean 'prompt'"):
        found(PAIR, prompt="promt")


@pytest.mark.parametrize(
    ("row", "kind", "missing", "message"),
    [
        ({"question": ASK, "answer": GOOD}, "pairs", ("chosen", "rejected"), "no columns are known to hold answers"),
        ({"chosen": GOOD, "rejected": BAD}, "pairs", ("prompt",), "no column is known to hold prompts"),
        ({"text": ASK}, "prompts", ("prompt",), "no column is known to hold prompts"),
        ({"prompt": ASK, "response_a": GOOD, "response_b": BAD}, "pairs", ("verdict",), "response_a, response_b"),
        (
            {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": 0},
            "pairs",
            ("verdict",),
            "means: index if 0 stands for response_a",
        ),
        (
            {"chosen": '{"messages": ["a b c d", 1]}', "rejected": '{"messages": ["a b c d", 2]}'},
            "pairs",
            ("prompt",),
            "no column is known to hold prompts",
        ),
    ],
)
def test_rows_that_cannot_be_read_say_what_is_missing(row, kind, missing, message):
    with pytest.raises(NotFound, match=re.escape(message)) as error:
        found(row, kind=kind)
    assert error.value.missing == missing


def test_a_common_beginning_is_the_prompt_only_if_nearly_all_rows_have_one_of_their_own():
    rows = [{"chosen": f"The boat of {n} is white.", "rejected": f"The boat of {n} is green."} for n in "abc"]
    read_rows, dropped = read(*rows)
    assert read_rows[0] == ([("u", "The boat of a is")], " white.", " green.") and not dropped
    assert found(*rows)["beginning"] == "shared"
    for others in ([{"chosen": "Yes.", "rejected": "No."}] * 2, [rows[0]] * 5):
        with pytest.raises(NotFound):
            found(*rows[:1], *others)


def test_answers_that_repeat_the_prompt_are_cut_if_all_rows_do_and_refused_if_some_do():
    again = {"prompt": ASK, "chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"}
    assert read(again, again) == ([ONE[0][0]] * 2, {})
    assert read(again, PAIR) == (ONE[0], {"answers that repeat the prompt": 1})


def test_bad_rows_beside_good_ones_do_not_change_how_these_are_read():
    bad = [{"note": "x"}, {"prompt": None, "chosen": 3}] * 200
    rows, dropped = read(*bad, PAIR)
    assert rows == ONE[0] and sum(dropped.values()) == 400


def test_a_file_of_another_layout_behind_does_not_hide_the_first():
    assert found(PAIR, PAIR, {"question": ASK, "good": GOOD, "bad": BAD})["chosen"] == "chosen"


def test_a_given_column_may_begin_behind_other_rows(tmp_path):
    rows = [PAIR] * 1000 + [PAIR | {"sys": "Be brief."}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert probe(Entry(str(path)), "pairs", Columns(system="sys")).columns.system == "sys"


def test_how_rows_are_read_is_said():
    assert said(Columns(prompt="question", system="sys", chosen="good", rejected="bad")) == (
        "read as: sys -> system, question -> prompt, good -> chosen, bad -> rejected"
    )
    columns = Columns(prompt="prompt", answers=("a", "b"), verdict="winner", means="name", ignore=("tools",))
    assert said(columns) == "read as: prompt -> prompt, a, b -> answers, winner -> verdict (name), without tools"


def test_a_prompt_comes_from_where_it_is_whole():
    talk = [{"role": "user", "content": ASK}, {"role": "assistant", "content": GOOD}]
    other = [talk[0], {"role": "assistant", "content": BAD}]
    asked = [("u", ASK)]
    assert read({"conversation_a": talk, "conversation_b": other}, kind="prompts") == ([(asked,)], {})
    assert read({"prompt": ASK, "messages": [*talk, *talk]}, kind="prompts") == ([(asked,)], {})
    system = {"role": "system", "content": "Be brief."}
    rows, _ = read({"prompt": ASK, "chosen": [system, *talk], "rejected": [system, *other]}, kind="prompts")
    assert rows == [([("s", "Be brief."), *asked],)]
    assert read({"instruction": ASK, "context": "Two men.", "response": GOOD}, kind="prompts")[0] == [
        ([("u", f"{ASK}\nTwo men.")],)
    ]
