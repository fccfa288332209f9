"""Prompts that are too long lose whole turns first, and then the beginning of their question; answers their end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.sections import DataConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.conversations import answered, prompts_of
from sampo_ray.data.cutting import shortened
from sampo_ray.data.preferences import PAIRS, tokenized_pairs, tokenized_prompts
from sampo_ray.data.template import TOO_LONG
from sampo_ray.sources.rows import Counts, Row

words = st.lists(st.sampled_from(["hello ", "world ", "x", "\n", "é"]), max_size=30).map("".join)
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module", params=["llama3-sampo", "llama3"])
def chat(tiny_model, request):
    return ChatFormat.load(tiny_model, request.param)


def row_of(messages, chosen="Yes.", rejected="No."):
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return Row("a", "a:1", messages, *answers, {})


def turns(texts, system=None):
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


conversations = st.tuples(st.integers(0, 3), st.lists(words, min_size=7, max_size=7), st.none() | words).map(
    lambda made: turns([f"{text}?" for text in made[1]][: 2 * made[0] + 1], made[2])
)


@given(messages=conversations, limit=st.integers(4, 120))
def test_a_cut_prompt_keeps_its_system_turn_and_as_many_whole_turns_as_fit(chat, messages, limit):
    counts = Counts(rows=1)
    made = prompts_of([row_of(messages)], chat, limit, counts)
    system = [each for each in messages if each["role"] == "system"]
    ids = chat.prompt_ids
    if not made:
        assert counts.dropped == {TOO_LONG: 1}
        assert len(ids([*system, {"role": "user", "content": "?"}])) > limit
        return
    [prompt] = made
    kept = prompt.asked.messages
    assert prompt.ids == ids(kept) and len(prompt.ids) <= limit
    assert (prompt.cut is None) == (kept == messages) == (counts.prompts_cut == 0)
    assert kept[: len(system)] == system and kept[len(system)]["role"] == "user"
    begin = len(messages) - len(kept) + len(system)
    if prompt.cut and not prompt.cut.lost_characters:
        assert kept[len(system) :] == messages[begin:]
        assert len(ids([*system, *messages[begin - 2 :]])) > limit, "the turns before would fit, too"
    elif prompt.cut:
        assert counts.questions_cut == 1
        whole, left = messages[-1]["content"], kept[-1]["content"]
        assert len(kept) == len(system) + 1 and whole.endswith(left) and whole != left
        for more in (each for each in chat.token_starts(whole) if each < prompt.cut.lost_characters):
            assert len(ids([*system, {"role": "user", "content": whole[more:]}])) > limit


def test_a_result_of_a_tool_is_never_without_its_call():
    messages = turns(["old " * 20, "older", "which?", "call"], "Be brief.")
    messages += [{"role": "tool", "content": "result " * 9}, *turns(["so?", "call"])]
    messages += [{"role": "tool", "content": "another"}]

    def length(kept):
        return sum(len(message["content"].split()) for message in kept)

    def cut(limit):
        return shortened(messages, limit, length, lambda text: [i for i in range(len(text)) if text[i - 1] in " "])

    assert cut(length(messages) - 1).messages == [messages[0], *messages[3:]]
    assert cut(6).messages == [messages[0], *messages[6:]]
    assert cut(4) is None, "the last result alone is too long with its question"


def test_a_system_turn_that_leaves_no_room_drops_the_row(chat):
    counts, question = Counts(rows=2), turns(["short?"])
    rows = [row_of(turns(["short?"], "long " * 60)), row_of(question)]
    [kept] = prompts_of(rows, chat, 24, counts)
    assert kept.row.prompt == question
    assert counts.dropped == {TOO_LONG: 1}


@given(chosen=words, rejected=words, max_length=st.integers(64, 160))
def test_answers_are_cut_on_the_right(chat, chosen, rejected, max_length):
    data, counts = DataConfig(max_length=max_length), Counts(rows=1)
    row = row_of(turns(["Is it?"]), f"a{chosen}", f"b{rejected}")
    [pair] = answered(prompts_of([row], chat, data.prompt_limit, counts), chat, data, counts)
    [[block]] = [each.to_pylist() for each in tokenized_pairs([row], chat, data, Counts())]
    limit = max_length - len(pair.prompt.ids)
    for side, message in (("chosen", row.chosen), ("rejected", row.rejected)):
        text = message["content"].strip() if chat.name == "llama3" else message["content"]
        assert getattr(pair, side) == chat.response_ids(text)
        assert block[side] == getattr(pair, side)[:limit]
        assert (block[side][-1] == chat.end_of_turn_id) == (len(getattr(pair, side)) <= limit)
    assert counts.responses_cut == (len(pair.chosen) > limit) + (len(pair.rejected) > limit)


def test_only_what_is_too_long_is_cut_and_both_cuts_are_counted(chat):
    row, counts = row_of(turns(["x" * 100]), "y" * 100, "no"), Counts()
    [block] = tokenized_pairs([row], chat, DataConfig(max_length=64), counts)
    [pair] = block.to_pylist()
    assert block.schema == PAIRS
    assert 40 < len(pair["prompt"]) <= 48
    assert len(pair["prompt"]) + len(pair["chosen"]) == 64
    assert pair["rejected"] == chat.response_ids("no")
    assert (counts.prompts_cut, counts.questions_cut, counts.responses_cut) == (1, 1, 1)
    assert pair["chosen_reward"] is None


def test_rewards_are_for_answers_to_the_prompt_as_it_is_asked(chat):
    messages = turns(["old " * 80, "Yes.", "And now?"], "Be brief.")
    [block] = tokenized_prompts([row_of(messages)], chat, 72, counts := Counts())
    [prompt] = block.to_pylist()
    asked = [messages[0], messages[-1]]
    assert prompt["prompt"] == chat.prompt_ids(asked)
    assert prompt["messages"].count('"role"') == 2 and "old" not in prompt["messages"]
    assert (counts.prompts_cut, counts.questions_cut) == (1, 0)
