"""Records that become other records: trees, exports of tools, one answer a row."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.columns import Columns
from sampo_ray.sources.answers import ALONE, FEW, NEIGHBOURS, pick
from sampo_ray.sources.messages import turns_of
from sampo_ray.sources.reading import NotFound, choose
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts, rows_of
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.unfolding import FORMS, form_of, unfolded
from sampo_ray.sources.unusable import CALLS, REASONING, Unusable
from sampo_ray.sources.verdicts import DISAGREE, NO_VERDICT, TIE

ASK, GOOD, BAD, NEXT = "When does the ferry leave?", "At six and at noon.", "Often.", "From which pier?"


def user(text=ASK):
    return {"role": "user", "content": text}


def assistant(text=GOOD):
    return {"role": "assistant", "content": text}


def records(*rows):
    return [Record(f"ferry.jsonl:{n}", f"/data/ferry.jsonl:{n}", row) for n, row in enumerate(rows, start=1)]


def outcomes(*rows):
    """The form that is found, and of each record that rows become its position, prompt and pair (or the reason)."""
    read = records(*rows)
    columns = form_of(read)
    found = []
    for record in unfolded(read, columns):
        position = record.position.removeprefix("ferry.jsonl:")
        found.append((position, record.values.get("prompt"), pair_or_reason(record, columns)))
    return columns.form, found


def pair_or_reason(record, columns):
    try:
        return pick(record.values, columns)
    except Unusable as reason:
        return str(reason)


def message(name, parent, text, role="assistant", **others):
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "message_tree_id": "t", **others}


def reply(text, role, rank, *replies, **others):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **others}


TREE = {
    "message_tree_id": "t",
    "lang": "en",
    "prompt": reply(
        ASK,
        "prompter",
        None,
        reply(BAD, "assistant", 2),
        reply(
            GOOD,
            "assistant",
            0,
            reply(NEXT, "prompter", None, reply("From the north pier.", "assistant", 0), reply("?", "assistant", 1)),
            reply("Thanks!", "prompter", None, reply("A pleasure.", "assistant", None)),
        ),
        reply("At six.", "assistant", 1),
        reply("Gone.", "assistant", 3, deleted=True),
        reply("Spam.", "assistant", 3, review_result=False),
    ),
}


def test_every_message_of_a_user_in_a_tree_is_a_row_with_the_best_and_the_worst_answer():
    path = [user(), assistant(GOOD)]
    assert outcomes(TREE) == (
        "trees",
        [
            ("1", [user()], (GOOD, BAD)),
            ("1.2", [*path, user(NEXT)], ("From the north pier.", "?")),
            ("1.3", [*path, user("Thanks!")], FEW),
        ],
    )
    assert outcomes(TREE, TREE)[1][3][0] == "2"
    assert all(record.where == "/data/ferry.jsonl:1" for record in unfolded(records(TREE), form_of(records(TREE))))


def test_rows_of_messages_are_joined_into_their_tree():
    rows = [
        message("1", None, ASK, "prompter", rank=None),
        message("2", "1", BAD, rank=1),
        message("3", "1", GOOD, rank=0),
        message("4", "3", NEXT, "prompter", rank=0),
        message("6", "4", "From the north pier.", rank=0),
        message("5", "4", "?", rank=1),
        message("7", None, "Is it safe?", "prompter", message_tree_id="u"),
    ]
    expected = [
        ("1", [user()], (GOOD, BAD)),
        ("4", [user(), assistant(GOOD), user(NEXT)], ("From the north pier.", "?")),
        ("7", [user("Is it safe?")], FEW),
    ]
    assert outcomes(*rows) == ("messages_of_trees", expected)
    shuffled = [rows[n] for n in (4, 0, 2, 5, 1, 3)]
    assert {str(each[1:]) for each in outcomes(*shuffled)[1]} == {str(each[1:]) for each in expected[:2]}


def test_what_is_no_whole_tree_is_counted():
    assert outcomes(message("2", "1", GOOD, rank=0))[1] == [("1", None, FEW)]
    assert outcomes(message("1", None, ASK, "prompter", deleted=True))[1] == [("1", None, FEW)]
    assert outcomes({"prompt": reply(ASK, "prompter", None, deleted=True)})[1] == [("1", None, FEW)]


def task(*annotations, **data):
    return {"id": 7, "data": {"prompt": ASK, "answer1": BAD, "answer2": GOOD, **data}, "annotations": list(annotations)}


def annotation(selected, to_name="answer1,answer2", cancelled=False):
    result = {"from_name": "pw", "to_name": to_name, "type": "pairwise", "value": {"selected": selected}}
    return {"was_cancelled": cancelled, "result": [result]}


def test_a_task_of_label_studio_has_the_side_that_its_annotators_selected():
    rows = [
        task(annotation("right")),
        task(annotation("left", cancelled=True), annotation("right"), annotation("right")),
        task(annotation("left"), annotation("right")),
        task(annotation("left", cancelled=True)),
        task(),
        task(annotation("left", to_name="text1,text2")),
        task(annotation("left", to_name="one,other")),
    ]
    form, found = outcomes(*rows)
    pairs = [pair for _, _, pair in found]
    assert form == "label_studio"
    assert pairs == [(GOOD, BAD), (GOOD, BAD), DISAGREE, NO_VERDICT, NO_VERDICT, (BAD, GOOD), FEW]
    assert all(prompt == ASK for _, prompt, _ in found)


def test_choices_of_label_studio_are_columns_of_their_own():
    choices = {"result": [{"from_name": "better", "type": "choices", "value": {"choices": ["Answer 2"]}}]}
    read = records(task(choices))
    assert form_of(read) == Columns(form="label_studio")
    values = next(unfolded(read, form_of(read))).values
    assert values["better"] == ["Answer 2"] and values["answer2"] == GOOD


def feedback(rating, *, system=None, **ratings):
    """Open WebUI's feedback on the message `a` of a chat with two questions; the others' ratings by their names."""
    texts = {"a": GOOD, "b": BAD, "c": "At six."}
    messages = {
        "q": {"parentId": None, "childrenIds": ["p"], **user("Hello.")},
        "p": {"parentId": "q", "childrenIds": ["r"], **assistant("Ahoy.")},
        "r": {"parentId": "p", "childrenIds": list(texts), **user()},
    }
    for name, text in texts.items():
        rated = {"annotation": {"rating": ratings[name]}} if name in ratings else {}
        messages[name] = {"parentId": "r", "childrenIds": [], **assistant(text), **rated}
    chat = {"history": {"messages": messages, "currentId": "a"}} | ({"params": {"system": system}} if system else {})
    return {
        "id": "f",
        "type": "rating",
        "data": {"rating": rating},
        "meta": {"message_id": "a"},
        "snapshot": {"chat": {"title": "t", "chat": chat}},
    }


def test_a_rated_message_of_open_webui_stands_against_its_siblings():
    before = [user("Hello."), assistant("Ahoy."), user()]
    form, found = outcomes(
        feedback(1),
        feedback(-1, b=-1, c=1),
        feedback(1, b=1, c=1),
        feedback(None),
        feedback(1, system="You sell tickets.", b=-1),
    )
    assert form == "open_webui"
    assert [pair for _, _, pair in found] == [
        (assistant(GOOD), assistant(BAD)),
        (assistant("At six."), assistant(GOOD)),
        TIE,
        TIE,
        (assistant(GOOD), assistant(BAD)),
    ]
    assert found[0][1] == before
    assert found[4][1] == [{"role": "system", "content": "You sell tickets."}, *before]


def test_files_of_open_webuis_messages_are_not_lost():
    row = feedback(1)
    row["snapshot"]["chat"]["chat"]["history"]["messages"]["r"]["files"] = [{"type": "image"}]
    assert outcomes(row)[1][0][1][-1]["files"] == [{"type": "image"}]


@pytest.mark.parametrize(("block", "reason"), [("reasoning", REASONING), ("tool_calls", CALLS)])
def test_blocks_in_the_text_of_open_webuis_answers_are_what_they_are(block, reason):
    row = feedback(1)
    answer = row["snapshot"]["chat"]["chat"]["history"]["messages"]["a"]
    answer["content"] = f'<details type="{block}" done="true">Hm.</details>' + GOOD
    chosen, _ = outcomes(row)[1][0][2]
    with pytest.raises(Unusable, match=reason):
        turns_of(chosen, "assistant")


def test_a_chat_that_goes_round_in_circles_ends():
    row = feedback(1)
    row["snapshot"]["chat"]["chat"]["history"]["messages"]["q"]["parentId"] = "r"
    assert outcomes(row)[1][0][2] == (assistant(GOOD), assistant(BAD))


def test_preference_data_of_vertex_has_messages_of_parts():
    row = {
        "systemInstruction": {"parts": [{"text": "You sell "}, {"text": "tickets."}]},
        "contents": [{"role": "user", "parts": [{"text": ASK}]}],
        "completions": [
            {"score": 0, "completion": {"role": "model", "parts": [{"text": BAD}]}},
            {"score": 1, "completion": {"role": "model", "parts": [{"text": GOOD}]}},
        ],
    }
    form, found = outcomes(row)
    assert (form, found) == ("vertex", [("1", [user()], (assistant(GOOD), assistant(BAD)))])
    assert next(unfolded(records(row), form_of(records(row)))).values["system"] == "You sell tickets."
    row["contents"][0]["parts"].append({"inlineData": {"mimeType": "image/png", "data": ""}})
    assert [part["type"] for part in outcomes(row)[1][0][1][0]["content"]] == ["text", "inlineData"]


def test_preference_data_of_nova_has_labelled_candidates():
    row = {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "You sell tickets."}],
        "messages": [
            {"role": "user", "content": [{"text": ASK}]},
            {
                "role": "assistant",
                "candidates": [
                    {"content": [{"text": BAD}], "preferenceLabel": "non-preferred"},
                    {"content": [{"text": GOOD}], "preferenceLabel": "preferred"},
                ],
            },
        ],
    }
    assert outcomes(row) == ("nova", [("1", [user()], (assistant(GOOD), assistant(BAD)))])
    assert next(unfolded(records(row), form_of(records(row)))).values["system"] == "You sell tickets."
    with_tools = next(unfolded(records(row | {"toolConfig": {"tools": [{}]}}), form_of(records(row)))).values
    assert with_tools["tools"] == {"tools": [{}]}
    row["messages"][1]["candidates"][0]["preferenceLabel"] = "?"
    assert outcomes(row)[1][0][2] == FEW


def argilla(responses, states, **others):
    n = {"preference.responses": responses, "preference.responses.users": ["u"], "preference.responses.status": states}
    return {"prompt": ASK, "response-1": BAD, "response-2": GOOD, **n, "preference.suggestion": "response-1", **others}


def test_of_argillas_records_what_was_submitted_counts():
    form, found = outcomes(
        argilla(["response-2"], ["submitted"]),
        argilla(["response-1", "response-2"], ["discarded", "submitted"]),
        argilla(["response-1", "response-2"], ["submitted", "submitted"]),
        argilla(["response-1"], ["draft"]),
        argilla(None, None),
    )
    assert form == "argilla"
    assert [pair for _, _, pair in found] == [(GOOD, BAD), (GOOD, BAD), DISAGREE, NO_VERDICT, NO_VERDICT]


@pytest.mark.parametrize(
    "value",
    [
        [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}],
        {"value": ["response-1", "response-2"], "rank": [2, 1]},
    ],
)
def test_rankings_of_argilla_are_read_in_both_of_its_forms(value):
    of_version_1 = {"user_id": "u", "status": "submitted", "value": value}
    row = {"prompt": ASK, "response-1": BAD, "response-2": GOOD, "ranking": [of_version_1]}
    assert outcomes(row) == ("argilla", [("1", ASK, (GOOD, BAD))])
    assert outcomes(argilla([value], ["submitted"]))[1][0][2] == (GOOD, BAD)


def test_a_task_of_prodigy_has_what_was_accepted():
    row = {
        "text": ASK,
        "options": [{"id": 1, "text": BAD}, {"id": 2, "text": GOOD}],
        "accept": [2],
        "answer": "accept",
    }
    form, found = outcomes(row, row | {"answer": "reject"}, row | {"answer": "ignore", "accept": []})
    assert form == "prodigy"
    assert [pair for _, _, pair in found] == [(GOOD, BAD), NO_VERDICT, NO_VERDICT]


def test_a_battle_with_lists_of_turns_has_its_first_question_and_what_follows():
    row = {"prompt": f'["{ASK}"]', "response_a": f'["{GOOD}"]', "response_b": f'["{BAD}"]', "winner_model_a": 1}
    longer = {"prompt": [ASK, NEXT], "response_a": [GOOD, "North."], "response_b": [BAD, "South."]}
    first, second = unfolded(records(row, longer), form_of(records(row, longer)))
    assert form_of(records(row)).form == "battles"
    assert first.values["prompt"] == [user()] and first.values["response_b"] == [assistant(BAD)]
    assert second.values["response_a"] == [assistant(GOOD), user(NEXT), assistant("North.")]


def test_the_post_of_two_summaries_is_the_prompt_as_models_were_asked_it():
    info = {"id": "1", "post": "It left early.", "title": "The ferry", "subreddit": "boats", "article": None}
    row = {"info": info, "summaries": [{"text": BAD, "note": None}, {"text": GOOD, "note": None}], "choice": 1}
    asked = "SUBREDDIT: r/boats\n\nTITLE: The ferry\n\nPOST: It left early.\n\nTL;DR:"
    assert outcomes(row) == ("summaries", [("1", asked, (GOOD, BAD))])
    of_article = {"post": None, "title": None, "article": "Ferries are early."}
    found = outcomes(row, row | {"info": of_article}, row | {"info": None, "choice": None})[1][1:]
    assert found == [("2", "ARTICLE: Ferries are early.\n\nTL;DR:", (GOOD, BAD)), ("3", None, NO_VERDICT)]
    assert form_of(records({"info": info, "summary": {"text": GOOD}})) == Columns(form="summaries", prompt="prompt")


def rated(prompt, response, score, **others):
    return {"prompt": prompt, "response": response, "helpfulness": score, "id": response, **others}


def test_neighbours_with_the_same_prompt_are_one_row():
    rows = [
        rated(ASK, "At six.", 2, lang="en"),
        rated(ASK, BAD, 0, lang="en"),
        rated(ASK, GOOD, 4, lang="en"),
        rated(NEXT, GOOD, 3),
        rated("And back?", GOOD, 1),
        rated("And back?", BAD, 1),
        rated(ASK, GOOD, 4),
    ]
    form, found = outcomes(*rows)
    assert form == NEIGHBOURS
    assert found == [("1", ASK, (GOOD, BAD)), ("4", NEXT, ALONE), ("5", "And back?", TIE), ("7", ASK, ALONE)]
    values = next(unfolded(records(*rows), form_of(records(*rows)))).values
    assert values["lang"] == "en" and "id" not in values  # what all of them have


@pytest.mark.parametrize("labels", [(True, False), (1, 0), ("true", "false"), ("1", "0")])
def test_labels_of_one_answer_a_row_are_scores(labels):
    rows = [
        {"prompt": [user()], "completion": [assistant(text)], "label": label}
        for text, label in zip((GOOD, BAD), labels, strict=True)
    ]
    assert outcomes(*rows)[1] == [("1", [user()], ([assistant(GOOD)], [assistant(BAD)]))]
    whole = [
        {"messages": [user(), assistant(text)], "label": label} for text, label in zip((GOOD, BAD), labels, strict=True)
    ]
    assert outcomes(*whole)[1][0][2] == ([user(), assistant(GOOD)], [user(), assistant(BAD)])


@pytest.mark.parametrize("name", ["system", "system_prompt", "context", "history", "tools"])
def test_the_same_question_after_something_else_is_not_the_same_prompt(name):
    rows = [rated(ASK, GOOD, 4, **{name: "Speak as a sailor."}), rated(ASK, BAD, 0, **{name: "Speak as a child."})]
    assert [pair for _, _, pair in outcomes(*rows)[1]] == [ALONE, ALONE]
    same = [row | {name: "Speak as a sailor."} for row in rows]
    assert next(unfolded(records(*same), form_of(records(*same)))).values[name] == "Speak as a sailor."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "response": GOOD, "score": 3},
        {"question": ASK, "answer": GOOD},
        {"prompt": ASK, "messages": [user(), assistant()]},
        {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "a"},
        {"instruction": ASK, "generations": [GOOD, BAD], "ratings": [1, 2]},
        {"prompt": ASK, "response": GOOD, "label": "ferries"},
        {"prompt": ASK, "options": [GOOD, BAD], "data": {"x": 1}},
        {},
    ],
)
def test_other_rows_have_no_form(row):
    assert form_of(records(row)) is None
    assert list(unfolded(records(row), Columns())) == records(row)


def read(*rows, kind="pairs"):
    """What the whole of a source is read as, and why rows are dropped."""
    columns, counts = choose(records(*rows), kind, Columns()), Counts()
    found = list(rows_of(unfolded(records(*rows), columns), kind, columns, counts))
    pairs = [
        (row.prompt, row.chosen and row.chosen["content"], row.rejected and row.rejected["content"]) for row in found
    ]
    return pairs, dict(counts.dropped)


FERRY = ([user()], GOOD, BAD)
VOTED = {"prompt": ASK, "response_a": BAD, "response_b": GOOD}


@pytest.mark.parametrize(
    "rows",
    [
        [TREE],
        [task(annotation("right"))],
        [task({"result": [{"from_name": "better", "type": "choices", "value": {"choices": ["Answer 2"]}}]})],
        [argilla(["tie"], ["submitted"]), argilla(["response-2"], ["submitted"])],
        [rated(ASK, GOOD, 4), rated(ASK, BAD, 1)],
        [{"prompt": [ASK], "response_a": [BAD], "response_b": [GOOD], "winner_model_a": 0, "winner_model_b": 1}],
        [VOTED | {"winner": "model_b"}, VOTED | {"winner": "tie (bothbad)"}],
        [VOTED | {"preferred": GOOD}],
        [{"prompt": ASK, "responses": [BAD, "At six.", GOOD], "best_index": 2}],
        [{"input_text": ASK, "candidate_0": BAD, "candidate_1": GOOD, "choice": 1}],
        [{"prompt": ASK, "pos_resp": GOOD, "neg_resp": BAD}],
        [{"question": ASK, "answers": [{"author": "u", "text": t, "pm_score": n} for n, t in enumerate((BAD, GOOD))]}],
    ],
)
def test_what_is_unfolded_or_judged_is_read_to_the_end(rows):
    assert read(*rows)[0][0] == FERRY


SPELT = [
    [{"prompt": ASK, "generations": [BAD, GOOD], "ratings": [1, 5]}],
    [{"instruction": ASK, "completions": [{"response": BAD, "score": 1}, {"response": GOOD, "score": 2}]}],
    [{"prompt": [ASK], "response_a": [BAD], "response_b": [GOOD], "winner_model_a": 0, "winner_model_b": 1}],
    [{"messages": [user(), assistant(text)], "label": text == GOOD} for text in (GOOD, BAD)],
    [argilla(["response-2"], ["submitted"])],
    [task(annotation("right"))],
]


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("rows", SPELT)
def test_lists_and_objects_may_be_spelt_as_text_as_in_tables(rows, write):
    spelt = [{n: write(v) if isinstance(v, list | dict) else v for n, v in row.items()} for row in rows]
    assert read(*rows) == read(*spelt) == ([FERRY], {})


@given(
    st.lists(st.text(), min_size=2, max_size=4)
    | st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=4)
)
def test_what_is_spelt_is_the_same_again(values):
    assert spelled(json.dumps(values)) == spelled(repr(values)) == values
    with np.printoptions(threshold=10, floatmode="unique"):
        written = str(np.array(values, dtype=object if isinstance(values[0], str) else float))
    assert spelled(written) in (values, written)


@pytest.mark.parametrize(
    "text", ["", "[", "[]x", "{1, 2}", "[[B]]", "[a, b]", "{'a': }", "[1 +", "[" * 9999, None, 3, [1]]
)
def test_what_spells_no_list_and_no_object_is_as_it_is(text):
    assert spelled(text) is text


def test_what_a_service_declares_besides_is_not_lost():
    part = {"text": "You sell tickets."}
    vertex = {
        "systemInstruction": {"parts": [part]},
        "contents": [{"role": "user", "parts": [{"text": ASK}]}],
        "completions": [
            {"score": n, "completion": {"role": "model", "parts": [{"text": text}]}}
            for n, text in enumerate((BAD, GOOD))
        ],
    }
    system = {"role": "system", "content": "You sell tickets."}
    assert read(vertex) == ([([system, user()], GOOD, BAD)], {})
    tools = [{"functionDeclarations": [{"name": "timetable", "description": "When ferries leave"}]}]
    pairs, dropped = read(vertex, vertex | {"tools": tools})
    assert len(pairs) == 1 and "tools" in next(iter(dropped))


def test_prompts_of_a_battle_are_its_first_questions():
    row = {"prompt": [ASK, NEXT], "response_a": [GOOD, "North."], "response_b": [BAD, "South."], "winner": "model_a"}
    assert read(row, kind="prompts")[0] == [([user()], None, None)]


def test_a_verdict_that_can_be_meant_in_several_ways_says_what_to_write():
    with pytest.raises(NotFound, match=r"'label' holds 1.*means: index if 0 stands for response_a"):
        read(VOTED | {"label": 1})


def test_a_form_is_found_behind_rows_that_are_broken():
    rows = [{"prompt": None}] * 30 + [TREE]
    assert form_of(records(*rows)).form == "trees"


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
WHOLE = [
    TREE,
    message("1", None, ASK, "prompter"),
    message("2", "1", GOOD, rank=0),
    task(annotation("left")),
    feedback(1),
    {"contents": [{"role": "user", "parts": [{"text": ASK}]}], "completions": [{"score": 1, "completion": {}}]},
    {"messages": [user(), {"role": "assistant", "candidates": [{"content": [{"text": GOOD}]}]}]},
    argilla(["response-2"], ["submitted"]),
    {"prompt": [ASK], "response_a": [GOOD], "response_b": [BAD]},
    {"text": ASK, "options": [{"id": 1, "text": BAD}], "accept": [1], "answer": "accept"},
    {"info": {"post": ASK, "title": NEXT}, "summaries": [{"text": GOOD}, {"text": BAD}], "choice": 0},
    rated(ASK, GOOD, 1),
]


@given(st.data())
def test_broken_rows_of_any_form_are_counted_and_never_an_error(data):
    row = data.draw(st.sampled_from(WHOLE))
    name = data.draw(st.sampled_from(sorted(row)))
    broken = row | {name: broken_somewhere(data, row[name])}
    for form in FORMS:
        known = form_of(records(row)) if form_of(records(row)).form == form else None
        columns = known or Columns(form=form, prompt="prompt", answers="response", score="helpfulness")
        found = list(unfolded(records(broken, row), columns))
        assert found and len({record.position for record in found}) == len(found)
        assert all(pair_or_reason(record, columns) for record in found)


def broken_somewhere(data, value):
    """The value with one thing in it, at any depth, that is something else."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(value)))
        return value | {name: broken_somewhere(data, value[name])}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], broken_somewhere(data, value[at]), *value[at + 1 :]]
    return data.draw(ANYTHING)


def test_a_form_streams_and_keeps_one_tree_or_prompt_in_memory():
    def endless(row):
        return (Record(f"x:{n}", f"x:{n}", row(n)) for n in itertools.count())

    def peak(row, columns):
        stream = unfolded(endless(row), columns)
        list(itertools.islice(stream, 100))
        tracemalloc.start()
        for _ in itertools.islice(stream, 5000):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    of_messages = form_of(records(message("1", None, ASK, "prompter")))
    assert peak(lambda n: message(str(n), None, ASK, "prompter", message_tree_id=n // 3), of_messages) < 2**20
    assert peak(lambda n: rated(str(n // 3), GOOD, n), form_of(records(rated(ASK, GOOD, 1)))) < 2**20
    assert len(next(unfolded(endless(lambda n: rated(ASK, GOOD, n)), form_of(records(rated(ASK, GOOD, 1))))).values) < 9
