"""Tool calls in a chat format: whether its template can write them, and which of vLLM's parsers reads them."""

import re
from typing import TYPE_CHECKING, Any

from sampo_ray.config.tools import AUTO, FORMS, PARSERS
from sampo_ray.data.template import rendered
from sampo_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_QUESTION, _DESCRIPTION, _ARGUMENT, _RESULT = "Which one?", "Finds a planet.", "third from the sun", "a blue marble"
_PROPERTY = "sort_of_planet"
_PARAMETERS = {"type": "object", "properties": {_PROPERTY: {"type": "string"}}, "required": [_PROPERTY]}
_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find", "description": _DESCRIPTION, "parameters": _PARAMETERS}},
]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": {_PROPERTY: _ARGUMENT}}}
_CONVERSATION: list[Any] = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "find", "content": _RESULT},
]
_PARTS = {
    _DESCRIPTION: "the tools of a request",
    _PROPERTY: "the parameters of tools",
    _ARGUMENT: "calls of tools",
    _RESULT: "results of tools",
}


def tool_arguments(setting: str, tokenizer: "PreTrainedTokenizerBase") -> dict[str, object]:
    """vLLM's engine arguments for `serve.tools`. ConfigError if the chat template leaves tools, their calls or results
    out, which the policy would then never see, or if `auto` knows no parser for the form of its calls.
    """
    try:
        text, left_out = tools_left_out(tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"serve.tools={setting!r}: the chat template refuses tools ({error}); drop it, or choose a model with tools"
        ) from None
    if left_out:
        raise ConfigError(
            f"serve.tools={setting!r}: the chat template leaves out {', '.join(left_out)}; drop it, or "
            "choose a model with tools"
        )
    return {"enable_auto_tool_choice": True, "tool_call_parser": parser_of(text) if setting == AUTO else setting}


def tools_left_out(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[str]]:
    """A made-up conversation with tools as the tokenizer's template writes it, and what of the tools it leaves out.
    ValueError if it refuses them.
    """
    text = rendered(tokenizer, _CONVERSATION, ask=False, tools=_TOOLS)
    return text, [part for words, part in _PARTS.items() if words not in text]


def parser_of(conversation: str) -> str:
    """The parser for the calls in a rendered conversation. ConfigError if their form is that of none."""
    call = conversation.rpartition(_QUESTION)[2].partition(_RESULT)[0].strip()
    for form, parser in FORMS:
        if re.search(form, call):
            return parser
    known = ", ".join(sorted(PARSERS))
    raise ConfigError(f"serve.tools='auto': no parser is known for calls such as {call[:200]!r}; name one of {known}")
