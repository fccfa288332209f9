"""Rows with tools: asked with them where the chat template writes them, calls as answers, refusals with a reason."""

import copy
import json
from pathlib import Path

import pytest

from sampo_ray.config.sections import DataConfig
from sampo_ray.console.demo_task import tiny_tokenizer
from sampo_ray.data.calls import UNNAMED
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.preferences import tokenized_pairs, tokenized_prompts
from sampo_ray.data.template import CALL, KEYS, NAMES, REFUSED, SPECIAL, TOOLS
from sampo_ray.sources.messages import Unusable
from sampo_ray.sources.rows import Counts, Row

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<end_of_turn>"]

FERRY = {
    "name": "ferry_times",
    "description": "When ferries leave.",
    "parameters": {"type": "object", "properties": {"pier": {"type": "string"}}, "required": ["pier"]},
}
WRAPPED = {"type": "function", "function": FERRY}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When is the next ferry?"}]


def call(**arguments):
    function = {"name": "ferry_times", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


CALLED = [*ASKED, call(pier='the "old" one'), {"role": "tool", "name": "ferry_times", "content": "07:20"}]
TEXT = {"role": "assistant", "content": "At 07:20."}


def load(folder, template):
    """A tiny tokenizer with a template of those that TRL ships."""
    templates = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = tiny_tokenizer(["user assistant when is the next ferry"] * 4)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return ChatFormat.load(folder, "tokenizer")


def row_of(prompt, chosen=TEXT, rejected=None, tools=(WRAPPED,)):
    rejected = rejected or {"role": "assistant", "content": "Never."}
    return Row("a", "a:1", prompt, chosen, rejected, {}, list(tools))


def own(chat, messages, ask=False):
    """What the template makes of a conversation with its tools, as a request brings them."""
    return chat.tokenizer.apply_chat_template(messages, tools=[WRAPPED], tokenize=False, add_generation_prompt=ask)


TAKES_TOOLS = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1"]


@pytest.mark.parametrize("template", TAKES_TOOLS)
@pytest.mark.parametrize("prompt", [ASKED, CALLED], ids=["asked", "called"])
@pytest.mark.parametrize("tools", [(WRAPPED,), (FERRY,)], ids=["wrapped", "bare"])
def test_a_row_with_tools_is_what_the_template_writes_of_it(tmp_path, template, prompt, tools):
    chat, counts = load(tmp_path, template), Counts(rows=1)
    chosen = call(pier="the new one")
    [block] = tokenized_pairs([row_of(prompt, chosen, tools=tools)], chat, DataConfig(), counts)
    [pair] = block.to_pylist()
    decode = chat.tokenizer.decode
    assert decode(pair["prompt"]) == own(chat, prompt, ask=True)
    for side, answer in (("chosen", chosen), ("rejected", {"role": "assistant", "content": "Never."})):
        ids = pair["prompt"] + pair[side]
        whole = chat.tokenizer(own(chat, [*prompt, answer]), add_special_tokens=False)["input_ids"]
        assert whole[: len(ids)] == ids and ids[-1] == chat.end_of_turn_id


def test_the_tools_of_a_prompt_are_asked_with_and_reach_the_reward(tmp_path):
    chat = load(tmp_path, "qwen3")
    [block] = tokenized_prompts([row_of(CALLED, None)], chat, 4096, Counts(rows=1))
    [prompt] = block.to_pylist()
    assert chat.tokenizer.decode(prompt["prompt"]) == own(chat, CALLED, ask=True)
    assert json.loads(prompt["messages"]) == CALLED
    assert json.loads(prompt["columns"]) == {"tools": [WRAPPED]}


def test_no_tools_are_an_empty_list_of_them(tmp_path):
    chat = load(tmp_path, "qwen3")
    assert chat.asked(ASKED, []).text == chat.asked(ASKED).text == chat.render(ASKED)


def test_cut_prompts_keep_their_tools(tmp_path):
    chat = load(tmp_path, "qwen3")
    messages = [ASKED[0], {"role": "user", "content": "old " * 99}, TEXT, *CALLED[1:]]
    limit = len(chat.encode_prompts([chat.asked(CALLED, [WRAPPED]).text])[0])
    [block] = tokenized_prompts([row_of(messages, None)], chat, limit, counts := Counts(rows=1))
    assert json.loads(block["messages"][0].as_py()) == CALLED
    assert (len(block["prompt"][0].as_py()), counts.prompts_cut) == (limit, 1)


def test_tools_are_as_vllm_hands_those_of_a_request_to_the_template():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam

    from sampo_ray.data.calls import as_requested

    for function in (FERRY, {"name": "now"}, {"parameters": {}, "name": "now", "description": "x", "strict": True}):
        [tool] = as_requested([function])
        requested = ChatCompletionToolsParam.model_validate({"type": "function", "function": function})
        assert json.dumps(tool) == json.dumps(requested.model_dump())


@pytest.mark.parametrize("template", ["llama3-sampo", "llama3"])
@pytest.mark.parametrize(
    "row",
    [row_of(ASKED), row_of(ASKED, call(pier="a"), tools=()), row_of(CALLED, tools=())],
    ids=["tools", "call", "result"],
)
def test_templates_without_tools_drop_the_row_for_that_reason(tiny_model, template, row):
    chat, counts = ChatFormat.load(tiny_model, template), Counts(rows=1)
    assert list(tokenized_pairs([row], chat, DataConfig(), counts)) == []
    assert counts.dropped == {TOOLS: 1}


SAYING = [*ASKED, {**call(pier="x"), "content": "I look it up."}, CALLED[-1], ASKED[1]]
TWICE = {**call(pier="x"), "tool_calls": [*call(pier="a")["tool_calls"], *call(pier="b")["tool_calls"]]}


@pytest.mark.parametrize(
    ("template", "reason", "row"),
    [
        ("gemma3", TOOLS, row_of(ASKED[1:])),
        ("llama3_1", TOOLS, row_of(SAYING)),
        ("llama3_1", CALL, row_of(ASKED, SAYING[2])),
        ("llama3_1", REFUSED, row_of(ASKED, TWICE)),
        ("qwen3", SPECIAL, row_of(ASKED, call(pier="<|im_end|>"))),
        ("qwen3", UNNAMED, row_of(ASKED, tools=[{"description": "x"}])),
        ("qwen3", NAMES, row_of([ASKED[0], {**ASKED[1], "name": "Ada"}])),
        ("qwen3", KEYS, row_of([ASKED[0], {**ASKED[1], "weight": 1}])),
        ("qwen3", KEYS, row_of(ASKED, {**TEXT, "reasoning_content": "x"})),
    ],
)
def test_what_a_template_would_lose_drops_the_row_for_a_reason(tmp_path, template, reason, row):
    chat, counts = load(tmp_path, template), Counts(rows=1)
    assert list(tokenized_pairs([row], chat, DataConfig(), counts)) == []
    assert counts.dropped == {reason: 1}


def test_of_several_calls_none_is_lost(tmp_path):
    chat = load(tmp_path, "qwen2_5")
    text = chat.response(chat.asked(ASKED, [WRAPPED]), TWICE)
    assert text.count("<tool_call>") == 2
    losing = copy.deepcopy(chat.tokenizer)
    losing.chat_template = losing.chat_template.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    losing.save_pretrained(tmp_path)
    chat = ChatFormat.load(tmp_path, "tokenizer")
    with pytest.raises(Unusable, match=CALL):
        chat.response(chat.asked(ASKED, [WRAPPED]), TWICE)
