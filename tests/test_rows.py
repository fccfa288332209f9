"""One record, read as given columns say: a row, or the reason that it is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.columns import Columns
from sampo_ray.sources.lost import lost_column
from sampo_ray.sources.reading import choose
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts, rows_of
from sampo_ray.sources.unfolding import unfolded

ASK, GOOD, BAD = "Who mends the nets?", "The two brothers at the pier.", "Nobody."
PAIR = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text=ASK):
    return {"role": "user", "content": text}


def answer(text=GOOD):
    return {"role": "assistant", "content": text}


def read(row, kind="pairs", **columns):
    """A row, or the reason for which it is dropped."""
    records, counts = [Record("a.jsonl:1", "/a.jsonl:1", row)], Counts()
    chosen = choose(records, kind, Columns(**columns))
    rows = list(rows_of(unfolded(records, chosen), kind, chosen, counts))
    return rows[0] if rows else next(iter(counts.dropped))


def turns(row):
    assert not isinstance(row, str), row
    return [*row.prompt, row.chosen["content"], row.rejected["content"]]


EARLIER = [user("Is the pier far?"), answer("Ten minutes.")]
FIRST, SECOND = "Is the pier far?", EARLIER[1]
WHOLE = [*EARLIER, user(), GOOD, BAD]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [*EARLIER, user()], "chosen": GOOD, "rejected": BAD},
        {"prompt": [*EARLIER, user()], "chosen": [answer()], "rejected": answer(BAD)},
        {"chosen": [*EARLIER, user(), answer()], "rejected": [*EARLIER, user(), answer(BAD)]},
        {"prompt": ASK, "chosen": [*EARLIER, user(), answer()], "rejected": [*EARLIER, user(), answer(BAD)]},
        {"prompt": FIRST, "chosen": [*EARLIER, user(), answer()], "rejected": [*EARLIER, user(), answer(BAD)]},
        {"prompt": FIRST, "chosen": [SECOND, user(), answer()], "rejected": [SECOND, user(), answer(BAD)]},
        {"prompt": EARLIER[:1], "chosen": [SECOND, user(), answer()], "rejected": [SECOND, user(), answer(BAD)]},
        {"prompt": [*EARLIER, user()], "chosen": [user(), answer()], "rejected": [user(), answer(BAD)]},
        {"prompt": EARLIER, "chosen": [user(), answer()], "rejected": [user(), answer(BAD)]},
        {"prompt": ASK, "history": [["Is the pier far?", "Ten minutes."]], "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "context": EARLIER, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "context": EARLIER, "chosen": [user(), answer()], "rejected": [user(), answer(BAD)]},
        {"messages": [*EARLIER, user(), answer()], "rejected_messages": [*EARLIER, user(), answer(BAD)]},
        {"messages": [*EARLIER, user(), answer()], "rejected_response": BAD},
        {"messages": [*EARLIER, user(), answer()], "chosen": GOOD, "rejected": BAD},
        {"prompt": [*EARLIER, user()], "chosen": [*EARLIER, user(), answer()], "rejected": [answer(BAD)]},
    ],
)  # fmt: skip
def test_a_conversation_may_be_cut_anywhere_between_columns(row):
    assert turns(read(row)) == WHOLE


def test_a_system_column_comes_in_front_of_everything_once():
    for prompt in (ASK, [user()], [SYSTEM, user()]):
        assert turns(read(PAIR | {"prompt": prompt, "system": "Be brief."})) == [SYSTEM, user(), GOOD, BAD]
    sides = {"chosen": [SYSTEM, user(), answer()], "rejected": [SYSTEM, user(), answer(BAD)]}
    assert turns(read(sides | {"prompt": ASK, "system": "Be brief."})) == [SYSTEM, user(), GOOD, BAD]
    assert turns(read(PAIR | {"system": SYSTEM})) == [SYSTEM, user(), GOOD, BAD]
    assert turns(read(PAIR | {"system": " "})) == [user(), GOOD, BAD]
    assert read(sides | {"system": "Be long."}) == "system prompts that differ"


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("chosen and rejected part before their last turn", {
            "prompt": ASK,
            "chosen": [answer(), user("Why?"), answer("So.")],
            "rejected": [answer(BAD), user("Why?"), answer("No.")],
        }),
        ("chosen and rejected answer different prompts", {
            "chosen": [user("a"), answer()], "rejected": [user("b"), answer(BAD)],
        }),
        ("a prompt that is no turn of the answers' conversation", {
            "prompt": "Where is the pier?", "chosen": [user(), answer()], "rejected": [user(), answer(BAD)],
        }),
        ("an answer begun in the prompt", PAIR | {"prompt": [user(), answer("The two")]}),
        ("an answer begun in the prompt", PAIR | {"initial_reason_steps": "Step 1: look."}),
        ("images, audio or files", PAIR | {"images": ["a.png"]}),
        ("reasoning beside the text of a message", PAIR | {"chosen_thinking": "Hm."}),
        ("wrong roles", PAIR | {"chosen": [user(), answer(), user("x")]}),
        ("empty response", PAIR | {"chosen": [{"role": "assistant", "content": " "}]}),
        ("tools that are no JSON schemas", PAIR | {"tools": ["tide"]}),
        ("neither text nor a list of messages", PAIR | {"prompt": 3}),
        (lost_column("context"), PAIR | {"context": "The pier is old."}),
        (lost_column("question"), PAIR | {"question": "Where is the pier?"}),
        (lost_column("input"), PAIR | {"input": "The pier is old."}),
        (lost_column("system_prompt"), PAIR | {"system": "Be brief.", "system_prompt": "Be long."}),
        (lost_column("messages"), PAIR | {"messages": [SYSTEM, user(), answer()]}),
        (lost_column("chat_template_kwargs"), PAIR | {"chat_template_kwargs": {"custom_instructions": "Be brief."}}),
        (lost_column("options"), PAIR | {"options": ["brothers", "sisters"]}),
    ],
)  # fmt: skip
def test_what_would_be_lost_or_is_contradicted_is_refused(reason, row):
    assert read(row) == reason


def test_history_that_is_a_text_is_refused():
    assert read(PAIR | {"talk": "Long ago."}, history="talk") == "earlier turns that cannot be told apart"


@pytest.mark.parametrize(
    "more",
    [
        {"images": [], "image": None, "video": ""},
        {"question": f" {ASK}", "query": [user()]},
        {"messages": [user(), answer("Another one.")]},
        {"conversation": [user(), answer("Another one."), user("Why?"), answer("So.")]},
        {"history": "[]", "tools": "[]", "context": {}, "system": float("nan")},
        {"context": "nets", "options": ["mends", "nets"]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"meta": {"system": "m1", "images": 3}, "source": "x"},
    ],
)
def test_columns_that_say_nothing_new_are_let_pass(more):
    assert turns(read(PAIR | more)) == [user(), GOOD, BAD]


def test_a_column_that_would_be_lost_is_named_or_ignored():
    row = PAIR | {"context": "The pier is old."}
    assert turns(read(row, input="context")) == [user(f"{ASK}\nThe pier is old."), GOOD, BAD]
    assert turns(read(row, system="context"))[0] == {"role": "system", "content": "The pier is old."}
    for ignored in ({"ignore": ("context",)}, {"input": None}, {"history": None}):
        assert turns(read(row, **ignored)) == [user(), GOOD, BAD]


def test_alpacas_input_goes_on_behind_the_instruction():
    for value, text in (("The pier.", f"{ASK}\nThe pier."), ("", ASK), (None, ASK), (12, f"{ASK}\n12")):
        row = read({"instruction": ASK, "input": value, "chosen": GOOD, "rejected": BAD})
        assert turns(row) == [user(text), GOOD, BAD]

    talk = {"instruction": ASK, "input": '[{"role": "user", "content": "x"}]', "chosen": GOOD, "rejected": BAD}
    assert read(talk) == "neither text nor a list of messages"


def test_tools_are_read_as_schemas_or_their_json():
    tool = {"type": "function", "function": {"name": "tide", "parameters": {}}}
    for tools in ([tool], '[{"type": "function", "function": {"name": "tide", "parameters": {}}}]'):
        assert read(PAIR | {"tools": tools}).tools == [tool]
    answers = {"preferred_output": [answer()], "non_preferred_output": [answer(BAD)]}
    row = answers | {"input": {"messages": [user()], "tools": [tool]}}
    assert read(row).tools == [tool] and turns(read(row)) == [user(), GOOD, BAD]
    assert read(PAIR | {"tools": []}).tools is None


def test_all_other_columns_go_to_reward_functions():
    row = read({"question": ASK, "answer": "two", "id": 7, "level": None, "chosen": "x"}, kind="prompts")
    assert row.columns == {"answer": "two", "id": 7, "level": None}
    assert (row.id, row.where) == ("a.jsonl:1", "/a.jsonl:1")


TEXT = st.text("abc xyz", min_size=1).filter(str.strip)


@given(st.lists(TEXT, min_size=1, max_size=5, unique=True), TEXT, TEXT, st.data())
def test_no_turn_is_lost_wherever_columns_cut_a_conversation(texts, chosen, rejected, data):
    texts = texts if len(texts) % 2 else texts[:-1]
    before = [(answer if n % 2 else user)(text) for n, text in enumerate(texts)]
    cut = data.draw(st.integers(0, len(before)))
    row = {
        "prompt": before[:cut] or None,
        "chosen": [*before[cut:], answer(chosen)],
        "rejected": [*before[cut:], answer(rejected)],
    }
    found = read(row)
    assert found == "identical responses" if chosen == rejected else turns(found) == [*before, chosen, rejected]
