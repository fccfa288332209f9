"""Tool calls in a chat format: whether its template can write them, and which of vLLM's parsers reads them."""

import re
from typing import Any

from sampo_ray.config.tools import AUTO, FORMS, PARSERS
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.template import FAILURES
from sampo_ray.errors import ConfigError

_QUESTION, _DESCRIPTION, _ARGUMENT, _RESULT = "Which one?", "Finds a planet.", "third from the sun", "a blue marble"
_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find", "description": _DESCRIPTION, "parameters": _PARAMETERS}},
]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": {"query": _ARGUMENT}}}
_CONVERSATION: list[Any] = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "find", "content": _RESULT},
]
_PARTS = {_DESCRIPTION: "the tools of a request", _ARGUMENT: "calls of tools", _RESULT: "results of tools"}


def tool_arguments(setting: str, chat: ChatFormat) -> dict[str, object]:
    """vLLM's engine arguments for `serve.tools`. ConfigError if the chat template leaves tools, their calls or results
    out, which the policy would then never see, or if `auto` knows no parser for the form of its calls.
    """
    try:
        text = str(chat.tokenizer.apply_chat_template(_CONVERSATION, tools=_TOOLS, tokenize=False))
    except FAILURES as error:
        raise ConfigError(
            f"serve.tools={setting!r}: the chat template refuses tools ({error}); drop it, or choose a model with tools"
        ) from None
    if left_out := ", ".join(part for words, part in _PARTS.items() if words not in text):
        raise ConfigError(
            f"serve.tools={setting!r}: the chat template leaves out {left_out}; drop it, or choose a model with tools"
        )
    return {"enable_auto_tool_choice": True, "tool_call_parser": parser_of(text) if setting == AUTO else setting}


def parser_of(conversation: str) -> str:
    """The parser for the calls in a rendered conversation. ConfigError if their form is that of none."""
    call = conversation.rpartition(_QUESTION)[2].partition(_RESULT)[0].strip()
    for form, parser in FORMS:
        if re.search(form, call):
            return parser
    known = ", ".join(sorted(PARSERS))
    raise ConfigError(f"serve.tools='auto': no parser is known for calls such as {call[:200]!r}; name one of {known}")
