"""Which of a row's answers becomes chosen, and how verdicts are meant."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.columns import Columns
from sampo_ray.sources.answers import ALONE, FEW, NEIGHBOURS, UNEQUAL, pick
from sampo_ray.sources.meaning import Unclear, means_of
from sampo_ray.sources.paths import at, has
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import BOTH_BAD, DISAGREE, NO_VERDICT, OTHER_VERDICT, TIE

GOOD, BAD = "The tide turns at noon.", "Whenever."
AB = ("response_a", "response_b")
REASONS = {TIE, BOTH_BAD, NO_VERDICT, OTHER_VERDICT, DISAGREE, FEW, UNEQUAL, ALONE}
SECOND_IS_BETTER = [
    ("name", "b"),
    ("name", "B"),
    ("name", " model_b "),
    ("name", "response_b"),
    ("name", "Response B"),
    ("name", "Assistant B is slightly better"),
    ("name", "[[B]]"),
    ("name", "B>A"),
    ("name", "A<<B"),
    ("name", "right"),
    ("name", "second"),
    ("name", "2"),
    ("name", 2),
    ("name", ["b"]),
    ("name", ["b", "b"]),
    ("name", "mistral-small"),
    ("index", 1),
    ("index", "1"),
    ("index", 1.0),
    ("index", np.int64(1)),
    ("index", True),
    ("number", 2),
    ("number", "2.0"),
    ("number", 1.7),
    ("number", np.float32(2)),
    ("sign", 1),
    ("sign", 3),
    ("sign", "2"),
    ("first", 0),
    ("first", False),
    ("first", "false"),
    ("first", np.bool_(False)),
    (None, "b"),
]


def two(verdict, means="name", **others):
    """A row whose second answer is the better one, and what its columns are."""
    row = {"response_a": BAD, "response_b": GOOD, "model_a": "llama-3-8b", "model_b": "Mistral-Small"}
    return row | {"winner": verdict, **others}, Columns(answers=AB, verdict="winner", means=means)


def outcome(row, columns):
    """The chosen and the rejected answer, or the reason that there is none."""
    try:
        return pick(row, columns)
    except Unusable as reason:
        return str(reason)


def reason_of(row, columns):
    found = outcome(row, columns)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(("means", "verdict"), SECOND_IS_BETTER)
def test_a_verdict_says_which_answer_is_chosen(means, verdict):
    assert pick(*two(verdict, means)) == (GOOD, BAD)


@pytest.mark.parametrize(
    ("means", "verdict", "reason"),
    [
        ("name", "tie", TIE),
        ("name", "Tie", TIE),
        ("name", "both", TIE),
        ("name", "neither", TIE),
        ("name", "no preference", TIE),
        ("name", "[[A=B]]", TIE),
        ("name", "about the same", TIE),
        ("index", 0.5, TIE),
        ("number", 1.5, TIE),
        ("number", 0, TIE),
        ("sign", 0, TIE),
        ("sign", "0", TIE),
        ("first", 0.5, TIE),
        ("name", "tie (bothbad)", BOTH_BAD),
        ("name", "both_bad", BOTH_BAD),
        ("name", "Both are bad", BOTH_BAD),
        ("name", None, NO_VERDICT),
        ("name", "", NO_VERDICT),
        ("name", "N/A", NO_VERDICT),
        ("name", "unsure", NO_VERDICT),
        ("name", [], NO_VERDICT),
        ("name", float("nan"), OTHER_VERDICT),
        ("index", None, NO_VERDICT),
        ("index", float("nan"), NO_VERDICT),
        ("sign", "nan", NO_VERDICT),
        ("name", "c", OTHER_VERDICT),
        ("name", "the elder", OTHER_VERDICT),
        ("name", "b is worse", OTHER_VERDICT),
        ("name", "a or b", OTHER_VERDICT),
        ("name", {"b": 1}, OTHER_VERDICT),
        ("index", 2, OTHER_VERDICT),
        ("index", -1, OTHER_VERDICT),
        ("index", "b", OTHER_VERDICT),
        ("number", 3, OTHER_VERDICT),
        ("first", 2, OTHER_VERDICT),
        (None, 1, OTHER_VERDICT),
        ("name", ["a", "b"], DISAGREE),
    ],
)
def test_a_verdict_that_chooses_none_is_counted_under_its_own_reason(means, verdict, reason):
    found = reason_of(*two(verdict, means))
    assert found == reason or (verdict != verdict and found == NO_VERDICT)


def test_a_model_that_wrote_both_answers_is_no_verdict():
    assert reason_of(*two("same-model", model_a="same-model", model_b="same-model")) in (OTHER_VERDICT, TIE)


def test_an_answer_that_is_missing_cannot_be_compared():
    assert reason_of(*two("b", response_b=None)) == FEW
    assert reason_of(*two("b", response_a=None)) == FEW


def test_numbers_in_the_names_of_columns_are_what_a_verdict_counts_by():
    row = {"response_0": BAD, "response_1": GOOD, "better": 1}
    assert pick(row, Columns(answers=("response_0", "response_1"), verdict="better", means="name")) == (GOOD, BAD)
    row = {"response1": BAD, "response2": GOOD, "better": "response2"}
    assert pick(row, Columns(answers=("response1", "response2"), verdict="better", means="name")) == (GOOD, BAD)


def test_one_column_a_verdict_is_true_for_the_better_answer():
    columns = Columns(answers=AB, verdict=("winner_model_a", "winner_model_b", "winner_tie"))

    def row(a, b, tie):
        return {"response_a": BAD, "response_b": GOOD, "winner_model_a": a, "winner_model_b": b, "winner_tie": tie}

    assert pick(row(0, 1, 0), columns) == (GOOD, BAD)
    assert pick(row("False", "True", "False"), columns) == (GOOD, BAD)
    assert pick(row(1.0, 0.0, None), columns) == (BAD, GOOD)
    assert reason_of(row(0, 0, 1), columns) == TIE
    assert reason_of(row(1, 1, 0), columns) == TIE
    assert reason_of(row(None, None, None), columns) == NO_VERDICT
    assert reason_of(row(0, 2, 0), columns) == OTHER_VERDICT


def test_a_list_of_answers_is_named_by_position_or_by_what_its_elements_are_called():
    row = {"options": [{"id": "x7", "text": BAD}, {"id": "x9", "text": GOOD}], "pick": None}
    columns = Columns(answers="options", text="text", verdict="pick", means="name")
    assert pick(row | {"pick": "x9"}, columns) == (GOOD, BAD)
    assert pick(row | {"pick": ["B"]}, columns) == (GOOD, BAD)
    assert pick(row | {"pick": 1}, columns.model_copy(update={"means": "index"})) == (GOOD, BAD)


def test_with_a_verdict_on_several_answers_the_first_other_one_is_rejected():
    row = {"options": [BAD, "Perhaps.", GOOD], "best": 2}
    assert pick(row, Columns(answers="options", verdict="best", means="index")) == (GOOD, BAD)


@pytest.mark.parametrize("scores", [[1, 7, 9], ["1", "N/A", "9.0"], [-2.5, None, 0], [False, float("nan"), True]])
def test_of_several_answers_the_highest_score_is_chosen_and_the_lowest_rejected(scores):
    texts = [BAD, "Perhaps.", GOOD]
    beside = {"generations": texts, "ratings": scores}
    within = {"answers": [{"text": text, "rating": score} for text, score in zip(texts, scores, strict=True)]}
    columns = {"a": BAD, "b": "Perhaps.", "c": GOOD, "a_s": scores[0], "b_s": scores[1], "c_s": scores[2]}
    assert pick(beside, Columns(answers="generations", score="ratings")) == (GOOD, BAD)
    assert pick(within, Columns(answers="answers", text="text", score="rating")) == (GOOD, BAD)
    assert pick(columns, Columns(answers=("a", "b", "c"), score=("a_s", "b_s", "c_s"))) == (GOOD, BAD)
    assert pick(beside, Columns(answers="generations", rank="ratings")) == (BAD, GOOD)
    as_text = {name: json.dumps(value) for name, value in beside.items()}
    assert pick(as_text, Columns(answers="generations", score="ratings")) == (GOOD, BAD)


def test_a_score_of_several_aspects_is_their_mean():
    def rated(*ratings):
        return {"annotations": {str(n): {"Rating": rating} for n, rating in enumerate(ratings)}}

    row = {"completions": [{"response": BAD, **rated("5", "1", "N/A")}, {"response": GOOD, **rated("4", "4", "N/A")}]}
    columns = Columns(answers="completions", text="response", score="annotations.*.Rating")
    assert pick(row, columns) == (GOOD, BAD)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answers": [GOOD, BAD], "scores": [1, 1]}, TIE),
        ({"answers": [GOOD, BAD], "scores": [1, None]}, FEW),
        ({"answers": [GOOD, None], "scores": [1, 2]}, FEW),
        ({"answers": [GOOD], "scores": [1]}, FEW),
        ({"answers": [], "scores": []}, FEW),
        ({"answers": None, "scores": None}, FEW),
        ({"answers": [GOOD, BAD], "scores": [1]}, UNEQUAL),
        ({"answers": [GOOD, BAD]}, UNEQUAL),
    ],
)
def test_answers_that_cannot_be_ranked_are_counted(row, reason):
    assert reason_of(row, Columns(answers="answers", score="scores")) == reason


def test_an_answer_without_a_neighbour_says_that_rows_are_to_be_sorted():
    columns = Columns(answers="answers", score="scores", form=NEIGHBOURS)
    assert reason_of({"answers": [GOOD], "scores": [1]}, columns) == ALONE
    assert "sort" in ALONE


def test_of_lists_of_chosen_and_rejected_answers_the_first_are_taken():
    columns = Columns(prompt="prompt", chosen="chosen", rejected="rejected")
    row = {"prompt": "When?", "chosen": [GOOD], "rejected": [BAD, "Who knows."]}
    assert pick(row, columns) == (GOOD, BAD)
    turns = [{"role": "assistant", "content": GOOD}]
    assert pick(row | {"chosen": turns}, columns) == (turns, BAD)
    assert pick(row | {"chosen": [turns, turns]}, columns) == (turns, BAD)
    assert pick(row, columns.model_copy(update={"prompt": None})) == ([GOOD], [BAD, "Who knows."])


def judged(first, second, verdict):
    return {"response_a": first, "response_b": second, "winner": verdict}


@given(st.integers(-4, 4), st.sampled_from(["index", "number", "sign", "first"]))
def test_swapping_the_answers_together_with_the_verdict_never_changes_the_pair(number, means):
    other = {"index": 1 - number, "number": 3 - number, "sign": -number, "first": 1 - number}[means]
    columns = Columns(answers=AB, verdict="winner", means=means)
    whole = outcome(judged(BAD, GOOD, number), columns)
    swapped = outcome(judged(GOOD, BAD, other), columns)
    assert whole == swapped or {whole, swapped} == {TIE, OTHER_VERDICT}  # an older AlpacaEval's draw is 0, never 3


@given(st.lists(st.one_of(st.none(), st.floats(), st.booleans(), st.integers(-3, 3)), min_size=2, max_size=2))
def test_swapping_answers_together_with_their_scores_never_changes_the_pair(scores):
    columns = Columns(answers="answers", score="scores")
    row, swapped = {"answers": [BAD, GOOD], "scores": scores}, {"answers": [GOOD, BAD], "scores": scores[::-1]}
    assert outcome(row, columns) == outcome(swapped, columns)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(ANYTHING, st.sampled_from(["index", "number", "sign", "first", "name", None]))
def test_any_value_is_a_verdict_or_has_a_reason(verdict, means):
    found = outcome(*two(verdict, means))
    assert found in REASONS or set(found) == {GOOD, BAD}


@given(ANYTHING, ANYTHING)
def test_any_values_are_ranked_or_have_a_reason(answers, scores):
    for columns in (Columns(answers="x", score="y"), Columns(answers="x", text="t", rank="y")):
        found = outcome({"x": answers, "y": scores}, columns)
        assert isinstance(found, tuple) or found in REASONS


@pytest.mark.parametrize(
    ("answers", "verdict", "values", "means"),
    [
        (AB, "winner", ["model_a", "tie", "model_b"], "name"),
        (AB, "winner", ["tie", "both_bad", None], "name"),
        (AB, "winner", [["response_a"], []], "name"),
        (AB, "better_response_id", [1, 1], "index"),
        (AB, "betterResponseId", [0, 1], "index"),
        (AB, "overall_preference", [-1, 2, 0], "sign"),
        (AB, "overall_preference", [1, 1], "sign"),
        (AB, "preference", [1, 2], "number"),
        (AB, "preference", [1.02, 1.5, 1.98], "number"),
        (AB, "preference", ["response_a", "b"], "name"),
        (("human_ref_A", "human_ref_B"), "labels", [1, 0], "first"),
        (AB, "label", [1, 2, 2], "number"),
        (AB, "label", ["1", "2"], "number"),
        (("response_0", "response_1"), "label", [0, 1, 1], "name"),
        (("response1", "response2"), "label", [1, 2], "name"),
        (AB, "is_a_better", [True, False], "first"),
        (AB, "b_is_better", [True, False], "index"),
        (AB, "responseBWins", [1, 0], "index"),
        (AB, "chosen_index", [1, 0], "index"),
        (AB, "bestIdx", [1], "index"),
        (("a", "b", "c"), "best", [0, 2], "index"),
        (("a", "b", "c"), "best", [1, 3], "number"),
    ],
)
def test_how_verdicts_are_meant_is_found_from_their_values_and_their_column(answers, verdict, values, means):
    rows = [dict.fromkeys(answers, GOOD) | {verdict: value} for value in values]
    assert means_of(rows, Columns(answers=answers, verdict=verdict)) == means


def test_verdicts_that_name_models_are_found():
    rows = [two("llama-3-8b")[0], two("mistral-small")[0]]
    assert means_of(rows, Columns(answers=AB, verdict="winner")) == "name"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 1], ["index", "first", "response_a"]),
        ([1, 1], ["index", "number", "first"]),
        ([True, False], ["index", "first"]),
        ([0, 1, 2], ["number", "index"]),
        ([-1, 1], ["sign", "other order"]),
        (["the elder"], ["'the elder'", "verdict"]),
        ([None, ""], ["no verdicts", "verdict"]),
    ],
)
def test_verdicts_that_can_be_meant_in_several_ways_are_asked_about(values, words):
    rows = [{"response_a": GOOD, "response_b": BAD, "label": value} for value in values]
    with pytest.raises(Unclear) as unclear:
        means_of(rows, Columns(answers=AB, verdict="label"))
    assert all(word in str(unclear.value) for word in [*words, "label", "data.columns"])


def test_a_path_ends_at_what_it_names():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}, {"d": 4}, {}]}, "n": None}
    assert at(row, "a.b") == 1
    assert at(row, "a.c.1.d") == 4
    assert at(row, "a.c.*.d") == [3, 4]
    assert at(row, "a.c.7.d") is None
    assert at(row, "a.x") is None
    assert [has(row, path) for path in ("n", "m", "a.c.0", "a.c.x")] == [True, False, True, False]


@given(st.lists(st.sampled_from(["a", "b", "a.b", ".", "*", "0", ""]), max_size=4), ANYTHING)
def test_any_path_is_there_or_not(parts, values):
    for row in itertools.chain([values], values if isinstance(values, list) else []):
        assert has(row, ".".join(parts)) or at(row, ".".join(parts)) is None


def test_columns_that_name_no_answers_are_counted_too():
    assert reason_of({"prompt": "When?"}, Columns()) == NO_VERDICT
    assert reason_of({"prompt": "When?", "winner": "a"}, Columns(verdict="winner", means="name")) == FEW
