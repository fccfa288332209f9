"""What columns hold, as turns: messages of every form, transcripts, templated text; what would be lost is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.sources.conversations import EMPTY_ANSWER
from sampo_ray.sources.messages import Message, Role, alternating, turns_of
from sampo_ray.sources.rows import Counts, read_rows
from sampo_ray.sources.unusable import (
    CALLS,
    EXTRAS,
    IMAGES,
    MARKS,
    PREFIX,
    REASONING,
    ROLES,
    SPELLED,
    TEXTLESS,
    TRANSCRIPT,
    UNICODE,
    UNREADABLE,
    Unusable,
)

Q, A, R, B = "Who mends the nets of Orle?", "The widow Sand does.", "Since when?", "Since the flood."
SYSTEM = "You keep the ferry of Orle."


def system(text: str = SYSTEM) -> Message:
    return {"role": "system", "content": text}


def user(text: str = Q) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str = A, **more: object) -> Message:
    return {"role": "assistant", "content": text, **more}


ASK, TALK = [user()], [user(), assistant(), user(R), assistant(B)]


def refused(value: object, role: Role = "user", behind: object = None) -> str:
    with pytest.raises(Unusable) as reason:
        turns_of(value, role, behind)
    return str(reason.value)


# ---- messages


@pytest.mark.parametrize("role", get_args(Role))
def test_text_is_one_turn_as_it_is(role: Role) -> None:
    assert turns_of(f" {Q}\n", role) == [{"role": role, "content": f" {Q}\n"}]


@pytest.mark.parametrize(
    "value",
    [
        {"role": "user", "content": Q},
        [{"role": "User ", "content": Q}],
        [{"from": "human", "value": Q}],
        [{"role": "prompter", "text": Q, "rank": None, "lang": "en", "review_count": 3}],
        [{"speaker": "customer", "utterance": Q}],
        [{"type": "human", "data": {"content": Q, "additional_kwargs": {}, "example": False}}],
        [
            {
                "lc": 1,
                "type": "constructor",
                "id": ["langchain", "schema", "messages", "HumanMessage"],
                "kwargs": {"content": Q},
            }
        ],
        [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": [Q]}, "create_time": 1.5}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": Q, "image_url": None}],
                "tool_calls": None,
                "name": None,
            }
        ],
        [{"role": "user", "content": [{"type": "input_text", "text": Q, "cache_control": {"type": "ephemeral"}}]}],
        [{"role": "user", "content": [{"text": Q}]}],
        [{"role": "user", "parts": [{"text": Q}]}],
        [{"role": "user", "content": Q, "text": Q}],
        [{"role": "user", "content": Q, "image": {"bytes": None, "path": None}, "files": [], "num_images": 0}],
        [["human", Q]],
        [[Q, None]],
        [{"input": Q, "output": ""}],
        {"content": Q},
        {"messages": [{"role": "user", "content": Q}], "tools": []},
        {"role": ["user"], "content": [Q]},
        json.dumps([{"role": "user", "content": Q}]),
        json.dumps({"from": "human", "value": Q}),
        str([{"role": "user", "content": Q}]),
        np.array([{"role": "user", "content": Q}], dtype=object),
        pa.array([[{"role": "user", "content": Q}]])[0],
        ({"role": "user", "content": Q},),
    ],
)
def test_every_form_of_a_message_is_one_turn(value: object) -> None:
    assert turns_of(value, "user") == ASK


@pytest.mark.parametrize(
    "value",
    [
        [
            {"from": "human", "value": Q},
            {"from": "gpt", "value": A},
            {"from": "human", "value": R},
            {"from": "gpt", "value": B},
        ],
        [{"input": Q, "output": A}, {"input": R, "output": B}],
        [{"user": Q, "assistant": A}, {"assistant": B, "user": R}],
        [[Q, A], [R, B]],
        [("human", Q), ("ai", A), ("human", R), ("ai", B)],
        {"from": ["human", "gpt", "human", "gpt"], "value": [Q, A, R, B]},
        str(TALK).replace("}, {", "}\n {"),  # as NumPy writes it
    ],
)
def test_every_form_of_a_conversation_is_its_turns(value: object) -> None:
    assert turns_of(value, "assistant") == TALK


def test_plain_texts_alternate_only_where_the_caller_says_so() -> None:
    assert alternating([Q, A, R, B]) == TALK
    assert refused([Q, A]) == UNREADABLE


def test_developers_are_the_system_and_the_text_of_a_refusal_is_an_answer() -> None:
    value = [{"role": "developer", "content": SYSTEM}, {"role": "user", "content": Q}]
    assert turns_of(value, "user") == [system(), *ASK]
    assert turns_of({"role": "assistant", "content": None, "refusal": A}, "assistant") == [assistant()]


def test_parts_of_text_are_joined_as_the_endpoint_joins_them() -> None:
    parts = [{"type": "text", "text": Q}, {"type": "text", "text": None}, {"type": "text", "text": R}]
    assert turns_of([{"role": "user", "content": parts}], "user") == [user(f"{Q}\n{R}")]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ROLES, {"role": "narrator", "content": Q}),
        (ROLES, {"role": "user", "content": Q, "tool_calls": [{"name": "tide", "arguments": {}}]}),
        (TEXTLESS, {"role": "user", "content": None}),
        (TEXTLESS, {"role": "user"}),
        (TEXTLESS, {"role": "user", "content": []}),
        (UNREADABLE, {"role": "user", "content": Q, "text": R}),
        (IMAGES, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}),
        (IMAGES, {"role": "user", "content": [{"type": "text", "text": Q, "image": "a.png"}]}),
        (IMAGES, {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}),
        (IMAGES, {"role": "user", "parts": [{"text": Q}, {"inlineData": {"data": "x"}, "type": "inlineData"}]}),
        (IMAGES, {"role": "user", "content": Q, "images": ["a.png"]}),
        (IMAGES, {"role": "user", "content": Q, "experimental_attachments": [{"url": "a.pdf"}]}),
        (IMAGES, {"role": "user", "content": f"<image>\n{Q}"}),
        (IMAGES, {"role": "user", "content": f"<|image_1|>{Q}"}),
        (REASONING, {"role": "assistant", "content": A, "reasoning_content": "Sand mends."}),
        (REASONING, {"role": "assistant", "content": A, "thinking": "Sand mends."}),
        (REASONING, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Sand."}, {"text": A}]}),
        (REASONING, {"role": "model", "parts": [{"text": "Sand.", "thought": True}, {"text": A}]}),
        (PREFIX, {"role": "assistant", "content": A, "prefix": True}),
        (EXTRAS, {"role": "user", "content": Q, "context": "The ferry."}),
        (EXTRAS, {"role": "system", "content": SYSTEM, "tools": [{"name": "tide"}]}),
        (EXTRAS, {"role": "user", "content": [{"type": "mystery", "payload": "x"}]}),
        (CALLS, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": "{"}}]}),
        (CALLS, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": "7"}}]}),
        (CALLS, {"role": "assistant", "content": "", "tool_calls": [{"type": "custom", "custom": {"name": "tide"}}]}),
        (UNICODE, {"role": "user", "content": "\ud800"}),
        (TRANSCRIPT, {"role": "user", "content": f"\n\nHuman: {Q}\n\nAssistant:"}),
        (MARKS, {"role": "user", "content": f"<|im_start|>user\n{Q}<|im_end|>"}),
    ],
)
def test_what_would_be_lost_of_a_message_is_refused_with_its_reason(reason: str, message: dict[str, Any]) -> None:
    assert refused([message]) == reason


@pytest.mark.parametrize("value", [7, None, [7], ["x"], [[Q, A, R]]])
def test_what_is_no_conversation_is_refused(value: object) -> None:
    assert refused(value) == UNREADABLE


def test_what_stands_beside_messages_is_not_lost() -> None:
    assert refused({"messages": ASK, "tools": [{"name": "tide"}]}) == EXTRAS


def test_what_only_counts_or_names_is_ignored() -> None:
    message = user() | {"reasoning_tokens": 52, "reasoning_effort": "low", "weight": 1, "model": "m", "toxic": False}
    assert turns_of([message], "user") == ASK


def test_messages_in_a_string_that_is_cut_off_are_refused_and_other_json_stays_text() -> None:
    whole = json.dumps(TALK)
    assert refused(whole[:-9], "assistant") == SPELLED
    for text in (
        '{"content": "x"}',
        '[{"name": "x"}]',
        "[1, 2]",
        "[Your Name]",
        '{"a": 1',
        json.dumps([Q, A]),
        "{}",
        "[]",
    ):
        assert turns_of(text, "assistant") == [assistant(text)]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ROLES, {"role": "moderator", "content": SYSTEM}),
        (TEXTLESS, {"role": "user", "content": None}),
        (IMAGES, {"role": "user", "content": [{"type": "image", "image": "a.png"}]}),
    ],
)
def test_messages_in_a_string_are_refused_for_what_they_hold(reason: str, message: dict[str, Any]) -> None:
    assert refused(json.dumps([message, *ASK])) == reason
    assert refused(json.dumps([message])) == reason


def test_json_that_names_people_is_no_conversation() -> None:
    for people in ([{"role": "cook", "name": "Sand"}], [{"author": "Sand", "text": Q}], [{"from": "Orle", "value": 7}]):
        assert turns_of(json.dumps(people), "assistant") == [assistant(json.dumps(people))]


# ---- tools

CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Orle"}}}
BARE = {"name": "tide", "arguments": {"port": "Orle"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": BARE | {"arguments": '{"port": "Orle"}'}, "id": None}]},
        {"role": "assistant", "content": "", "tool_calls": [BARE | {"arguments": {"port": "Orle", "day": None}}]},
        {"role": "assistant", "content": "", "function_call": BARE},
        {"from": "function_call", "value": json.dumps(BARE)},
        {"role": "tool_call", "content": json.dumps([BARE])},
        {"role": "model", "parts": [{"functionCall": {"name": "tide", "args": {"port": "Orle"}}}]},
        {"role": "assistant", "content": [{"toolUse": {"name": "tide", "input": {"port": "Orle"}}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "tide", "input": {"port": "Orle"}}]},
    ],
)
def test_calls_of_every_form_become_the_keys_that_templates_read(message: dict[str, Any]) -> None:
    assert turns_of([message], "assistant") == [assistant("", tool_calls=[CALL])]


def test_results_of_tools_are_turns_of_their_own() -> None:
    results = [
        {"role": "tool", "tool_call_id": "c1", "content": "06:12"},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "06:12"}]}],
        },
    ]
    for result in results:
        assert turns_of([result], "user") == [{"role": "tool", "content": "06:12", "tool_call_id": "c1"}]
    for role in ("function", "observation", "ipython"):
        assert turns_of([{"role": role, "content": "06:12"}], "user") == [{"role": "tool", "content": "06:12"}]
    told = {"role": "tool", "name": "tide", "content": '{"at": "06:12"}'}
    assert turns_of([{"role": "tool", "name": "tide", "content": {"at": "06:12", "note": None}}], "user") == [told]
    part = {"functionResponse": {"name": "tide", "response": {"at": "06:12"}}}
    assert turns_of([{"role": "user", "parts": [part]}], "user") == [told]


# ---- transcripts and templated text

Write = Callable[[list[Message]], str]


def named(first: str, between: str, human: str, bot: str) -> Write:
    names = {"user": human, "assistant": bot}
    return lambda turns: first + between.join(f"{names[turn['role']]} {turn['content']}" for turn in turns)


def templates(header: str, end: str, opens: str = "", bot: str = "assistant", gap: str = "") -> Write:
    def write(turns: list[Message]) -> str:
        names = {"user": "user", "assistant": bot}
        return opens + gap.join(header % names[turn["role"]] + turn["content"] + end for turn in turns)

    return write


def llama2(turns: list[Message]) -> str:
    return "".join(
        f"<s>[INST] {turn['content']} [/INST]" if turn["role"] == "user" else f" {turn['content']} </s>"
        for turn in turns
    )


FORMS = {
    "hh": named("\n\n", "\n\n", "Human:", "Assistant:"),
    "lines": named("", "\n", "Human:", "Assistant:"),
    "users": named("", "\n\n", "User:", "Assistant:"),
    "langchain": named("", "\n", "Human:", "AI:"),
    "guanaco": named("", "", "### Human:", "### Assistant:"),
    "alpaca": named("", "\n\n", "### Instruction:\n", "### Response:\n"),
    "vicuna": named("", " ", "USER:", "ASSISTANT:"),
    "oasst": named("", "\n", "prompter:", "assistant:"),
    "openchatkit": named("", "\n", "<human>:", "<bot>:"),
    "chatml": templates("<|im_start|>%s\n", "<|im_end|>\n"),
    "phi4": templates("<|im_start|>%s<|im_sep|>", "<|im_end|>"),
    "llama3": templates("<|start_header_id|>%s<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>"),
    "llama4": templates("<|header_start|>%s<|header_end|>\n\n", "<|eot|>", "<|begin_of_text|>"),
    "gemma": templates("<start_of_turn>%s\n", "<end_of_turn>\n", "<bos>", bot="model"),
    "granite": templates("<|start_of_role|>%s<|end_of_role|>", "<|end_of_text|>\n"),
    "zephyr": templates("<|%s|>\n", "</s>\n"),
    "phi3": templates("<|%s|>\n", "<|end|>\n"),
    "tulu": lambda turns: "".join(
        f"<|{turn['role']}|>\n{turn['content']}" + ("\n" if turn["role"] == "user" else "<|endoftext|>\n")
        for turn in turns
    ),
    "nemo": lambda turns: (
        "".join(f"<extra_id_1>{turn['role'].capitalize()}\n{turn['content']}\n" for turn in turns) + "<extra_id_1>"
    ),
    "llama2": llama2,
    "deepseek": lambda turns: (
        "<\uff5cbegin▁of▁sentence\uff5c>"
        + "".join(
            f"<\uff5cUser\uff5c>{turn['content']}"
            if turn["role"] == "user"
            else f"<\uff5cAssistant\uff5c>{turn['content']}<\uff5cend▁of▁sentence\uff5c>"
            for turn in turns
        )
    ),
}

words = st.text("2345 67,.?'\n", min_size=1, max_size=30).map(str.strip).filter(bool)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4).map(
    lambda pairs: [turn for asked, said in pairs for turn in (user(asked), assistant(said))]
)


@pytest.mark.parametrize("form", FORMS)
@given(talk=talks)
def test_a_conversation_that_is_written_as_one_text_is_read_back(form: str, talk: list[Message]) -> None:
    write = FORMS[form]
    whole, said = write(talk), talk[-1]["content"]
    assert turns_of(whole, "assistant") == talk
    asked = whole[: whole.rindex(said)]
    assert turns_of(asked, "user") == talk[:-1]
    assert turns_of(whole[len(asked) :], "assistant", behind=asked) == talk[-1:]
    if form in ("chatml", "gemma", "llama3"):
        assert refused(whole[: len(asked) + len(said)], "user") == PREFIX


@given(talk=talks)
def test_messages_as_json_are_read_back(talk: list[Message]) -> None:
    assert turns_of(json.dumps(talk), "assistant") == talk == turns_of(str(talk), "assistant")


ordinary = st.text(st.characters(exclude_characters="<[")) | st.lists(  # no mark of a template
    st.sampled_from(
        ["Human:", "Assistant:", "\n\n", "\n", " ", "User:", "the nets", "# ", "[", "]", "{", "<", ">", "|"]
    )
).map("".join)


@given(text=ordinary, role=st.sampled_from(get_args(Role)))
def test_text_that_begins_with_a_word_of_its_own_stays_as_it_is(text: str, role: Role) -> None:
    text = "So " + text.encode(errors="ignore").decode().rstrip() + " it is."
    assert turns_of(text, role) == [{"role": role, "content": text}]


@pytest.mark.parametrize(
    "text",
    [
        "Write a talk:\n\nHuman: hello\n\nAssistant: good day\n\nMake it longer.",
        "User: As a ferryman I ask for the tide.",
        "User : Hello\nAgent : hello, what is it?",
        "Q: Who mends the nets?\nA: Sand.",
        "### Nets\n\n### Human: no",
        "Use `docker run <image>`, the <img> tag, <image-name> or <s>this</s>.",
        "a <| b |> c, x<|y|>z",
        'Set eos_token="</s>", or "<|im_end|>"; `<|im_start|>` opens a turn, as `[INST]` does, `<image>` an image.',
        "<image><url>a.png</url></image>",
        "[INSTALL] it, then [Your Name].",
        "Assistants: two. Humans: one.",
    ],
)
def test_text_that_only_looks_like_a_transcript_or_a_template_stays_text(text: str) -> None:
    assert turns_of(text, "assistant") == [assistant(text)]


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        (f"\n\nHuman: {Q}\n\nAssistant:", [user(), assistant("")]),
        (f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman:", [user(), assistant()]),
        (f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {R}", [user(), assistant(), user(R)]),
        (f"\n\nHuman:\n\nHuman: {Q}\n\nAssistant: {A}", [user(), assistant()]),
        (f"\n\nHuman: {Q}\n\nHuman: {R}\n\nAssistant: {B}", [user(), user(R), assistant(B)]),
        (
            f"\n\nHuman: {Q}\n\nAssistant: One.\n\nTwo:\nHuman: x\n\nThree",
            [user(), assistant("One.\n\nTwo:\nHuman: x\n\nThree")],
        ),
        (f"\n\nAssistant: {A}\n\nHuman: {R}\n\nAssistant: {B}", [assistant(), user(R), assistant(B)]),
    ],
)
def test_odd_rows_of_hh_rlhf_are_read(value: str, turns: list[Message]) -> None:
    assert turns_of(value, "assistant") == turns


def test_a_preface_in_front_of_a_transcript_is_the_system() -> None:
    prompts = [
        f"{SYSTEM}\n\nHuman: {Q}\n\nAssistant:",
        f"System: {SYSTEM}\n\nHuman: {Q}\n\nAssistant:",
        f"### System:\n{SYSTEM}\n\n### User:\n{Q}\n\n### Assistant:\n",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{Q} [/INST]",
        f"[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]{Q}[/INST]",
        f"<extra_id_0>System\n{SYSTEM}\n<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n",
        f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n",
    ]
    for prompt in prompts:
        assert turns_of(prompt, "user") == [system(), *ASK]
        assert turns_of(A, "assistant", behind=prompt) == [assistant()]
    chat = "A chat between a ferryman and a guest."
    assert turns_of(f"{chat} USER: {Q} ASSISTANT:", "user") == [system(chat), *ASK]


def test_an_alpaca_prompt_is_its_instruction_and_input() -> None:
    frame = "Below is an instruction that describes a task, paired with an input that provides further context. "
    frame += "Write a response that appropriately completes the request.\n\n"
    prompt = f"{frame}### Instruction:\n{Q}\n\n### Input:\n{R}\n\n### Response:\n"
    assert turns_of(prompt, "user") == [user(f"{Q}\n{R}")]


def test_an_answer_keeps_its_white_space_but_behind_a_transcript() -> None:
    assert turns_of(f" {A}", "assistant", behind=Q) == [assistant(f" {A}")]
    assert turns_of(f" {A}", "assistant", behind=f"\n\nHuman: {Q}\n\nAssistant:") == [assistant()]


def test_an_answer_that_runs_on_behind_a_transcript_is_several_turns() -> None:
    run_on = f" {A}\n\nHuman: {R}\n\nAssistant: {B}"
    assert turns_of(run_on, "assistant", behind=f"\n\nHuman: {Q}\n\nAssistant:") == TALK[1:]


@pytest.mark.parametrize(
    "mark", ["<|im_end|>\n", "<|eot_id|>", "</s>", "<end_of_turn>\n<eos>", "<|endoftext|>", "<|end|>"]
)
def test_an_end_of_turn_mark_behind_an_answer_is_cut(mark: str) -> None:
    assert turns_of(A + mark, "assistant") == turns_of([assistant(A + mark)], "assistant") == [assistant()]
    assert refused(Q + mark, "user") == MARKS


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (TRANSCRIPT, f"Human: {Q}"),
        (TRANSCRIPT, f"Human: {Q}\nHuman: {R}\nAssistant: {A}"),
        (TRANSCRIPT, f"### Instruction:\n{Q}"),
        (MARKS, f"<|im_start|>user\n{Q}"),
        (MARKS, f"<|im_start|>narrator\n{Q}<|im_end|>"),
        (MARKS, f"<|im_start|>user\n{Q}<|im_end|> and more"),
        (MARKS, f"[INST] {Q}"),
        (MARKS, f"{Q} [/INST] {A}"),
        (MARKS, "What does <|im_start|> mean?"),
        (MARKS, f"{A}</s> \n{R}"),
        (MARKS, f"<|start|>user<|message|>{Q}<|end|>"),
        (MARKS, f"<|im_start|>user\n{Q} [INST]<|im_end|>\n"),
        (PREFIX, f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n<think>\n"),
    ],
)
def test_half_of_a_transcript_or_template_is_refused(reason: str, text: str) -> None:
    assert refused(text) == reason


def test_a_file_of_transcripts_is_read_row_by_row(tmp_path: Path) -> None:
    """As HH-RLHF's: with rows that end in an empty turn or with the user, and with a system's text in front."""
    ask, told = f"\n\nHuman: {Q}\n\nAssistant:", f"{SYSTEM}\n\nHuman: {Q}\n\nAssistant:"
    whole = [(f"{ask} {A}", f"{ask} {B}"), (f"{ask} {A}\n\nHuman:", f"{ask} {B}"), (ask, f"{ask} {B}")]
    asked = [(f"{ask} {A}\n\nHuman: {R}", f"{ask} {B}\n\nHuman: {R}")]
    systems = [(f"{told} {A}", f"{told} {B}"), (f"{told} The heron.", f"{told} The bream.")]
    for rows, pairs, reasons in (
        ([*whole, *asked], [ASK, ASK], [EMPTY_ANSWER, ROLES]),
        (systems, [[system(), *ASK]], [TRANSCRIPT]),
    ):
        path, counts = tmp_path / f"{len(rows)}.jsonl", Counts()
        path.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in rows))
        read = list(read_rows(str(path), "pairs", counts))
        assert [row.prompt for row in read] == pairs and list(counts.dropped) == reasons
        assert all((row.chosen, row.rejected) == (assistant(), assistant(B)) for row in read)


def test_real_texts_are_read_as_they_are(shared: Path) -> None:
    """But for four answers that ran on behind an end-of-turn mark."""
    refusals = []
    for path in sorted((shared / "data" / "prefs").rglob("*.jsonl.gz")):
        for row in map(json.loads, gzip.decompress(path.read_bytes()).splitlines()):
            for column in ("prompt", "chosen", "rejected"):
                value, role = row[column], "user" if column == "prompt" else "assistant"
                given = [{"role": role, "content": value}] if isinstance(value, str) else value
                try:
                    assert turns_of(value, role) == given  # type: ignore[arg-type]
                except Unusable as reason:
                    refusals.append(str(reason))
    assert refusals == [MARKS] * 4
