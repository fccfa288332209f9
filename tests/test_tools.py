"""Tool calls: which parsers there are, what a chat template must write, and what an endpoint without them answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from sampo_ray.config.run import load_config
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.config.serving import ServeConfig
from sampo_ray.config.tools import PARSERS
from sampo_ray.console.demo_task import tiny_tokenizer
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.tools import tool_arguments
from sampo_ray.errors import ConfigError
from sampo_ray.run.storage import Place
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.requests.openai import ChatCompletionRequest, validated, without_tools

FIND = {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FIND}]
HI = [{"role": "user", "content": "hello"}]
CALL = {"id": "abc", "type": "function", "function": {"name": "find", "arguments": "{}"}}
CHATML = """{%- if tools and SHOWS_TOOLS -%}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
NAMED = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
FORMS = {
    "hermes": "\n<tool_call>\n" + NAMED.replace("KEY", "arguments") + "\n</tool_call>",
    "llama3_json": NAMED.replace("KEY", "parameters"),
    "mistral": "[TOOL_CALLS][" + NAMED.replace("KEY", "arguments") + "]",
    "qwen3_coder": (
        "\n<tool_call>\n<function={{ call.function.name }}>\n{% for k, v in call.function.arguments | items %}"
        "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    ),
}


def chat_format(folder: Path, call: str, *tokens: str, shows_tools: bool = True) -> ChatFormat:
    tokenizer = tiny_tokenizer(["user assistant hello"] * 4)
    special = ["<|im_start|>", "<|im_end|>", *tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHATML.replace("CALL", call).replace("SHOWS_TOOLS", str(shows_tools).lower())
    tokenizer.save_pretrained(folder)
    return ChatFormat.load(folder, "tokenizer")


def test_the_known_parsers_are_vllms() -> None:
    from vllm.tool_parsers import ToolParserManager

    assert set(ToolParserManager.list_registered()) == PARSERS


@pytest.mark.parametrize("parser", FORMS)
def test_auto_finds_the_parser_that_reads_the_calls_which_the_template_writes(parser: str, tmp_path: Path) -> None:
    from vllm.tool_parsers import ToolParserManager

    chat = chat_format(tmp_path, FORMS[parser], "<|python_tag|>")
    assert tool_arguments("auto", chat.tokenizer) == {"enable_auto_tool_choice": True, "tool_call_parser": parser}
    if parser in ("hermes", "llama3_json"):  # the others read tokens, which only their own models have
        call = {**CALL, "function": {"name": "find", "arguments": {"query": 'a "b" é'}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = chat.tokenizer.apply_chat_template([*HI, turn], tokenize=False)
        answer = text.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
        request = ChatCompletionRequest(messages=HI, tools=TOOLS)
        reads = ToolParserManager.get_tool_parser(parser)(chat.tokenizer, request.tools)
        found = reads.extract_tool_calls(answer, request)
        assert found.tools_called
        function = found.tool_calls[0].function
        assert (function.name, json.loads(function.arguments)) == ("find", {"query": 'a "b" é'})


def test_a_template_that_leaves_tools_or_calls_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.tools='hermes'.*leaves out the tools of a request"):
        tool_arguments("hermes", chat_format(tmp_path, FORMS["hermes"], shows_tools=False).tokenizer)
    with pytest.raises(ConfigError, match="leaves out calls of tools"):
        tool_arguments("hermes", chat_format(tmp_path, "").tokenizer)
    with pytest.raises(ConfigError, match="refuses tools"):
        tool_arguments("hermes", chat_format(tmp_path, "{{ raise_exception('no') }}").tokenizer)
    unknown = chat_format(tmp_path, "call {{ call.function.arguments }}")
    with pytest.raises(ConfigError, match="no parser is known for calls such as .*name one of .*hermes"):
        tool_arguments("auto", unknown.tokenizer)
    assert tool_arguments("xlam", unknown.tokenizer)["tool_call_parser"] == "xlam"


def test_a_parser_that_needs_other_tokens_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    from sampo_ray.actors.policy.deployment import with_tools

    settings = GeneratorsConfig(engine={"gpu_memory_utilization": 0.5})
    assert with_tools(settings, None, Place(str(tmp_path))) == settings
    chat_format(tmp_path, FORMS["llama3_json"])
    with pytest.raises(ConfigError, match=r"serve\.tools='auto': this parser is for other tokenizers .*python_tag"):
        with_tools(settings, "auto", Place(str(tmp_path)))
    chat_format(tmp_path, FORMS["llama3_json"], "<|python_tag|>")
    engine = with_tools(settings, "auto", Place(str(tmp_path))).engine
    assert engine == {
        "gpu_memory_utilization": 0.5,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "llama3_json",
    }


def test_settings_that_cannot_work_are_refused_with_the_one_that_does() -> None:
    with pytest.raises(ValueError, match="tools='hermse' is not known; did you mean 'hermes'"):
        ServeConfig(tools="hermse")
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}}
    with pytest.raises(ConfigError, match=r"serve\.tools='auto' needs model\.template=tokenizer"):
        load_config({**tree, "serve": {"tools": "auto"}})
    load_config({**tree, "model": {"path": "m", "template": "tokenizer"}, "serve": {"tools": "auto"}})
    for name in ("tool_call_parser", "enable_auto_tool_choice"):
        with pytest.raises(ValueError, match=rf"engine\.{name} is not taken here: set serve\.tools"):
            GeneratorsConfig(engine={name: "hermes"})
    with pytest.raises(ValueError, match="log-probs are the model's own"):
        GeneratorsConfig(engine={"logprobs_mode": "processed_logprobs"})


def chat_request(**fields: Any) -> ChatCompletionRequest:
    return validated({"model": "policy", "messages": HI, **fields}, ChatCompletionRequest)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "find"}}}, "tools"),
        ({"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "messages[1]"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "abc", "content": "x"}]}, "messages[1]"),
    ],
)
def test_without_tools_a_request_that_needs_them_names_the_setting(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError, match=r"its operator turns them on with serve\.tools") as refused:
        without_tools(chat_request(**fields))
    assert (refused.value.status, refused.value.param) == (400, param)


def test_without_tools_a_request_that_forbids_them_is_an_ordinary_one() -> None:
    request = chat_request(tools=TOOLS, tool_choice="none")
    without_tools(request)
    assert request.tools is None
