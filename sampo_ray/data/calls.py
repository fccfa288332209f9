"""Tools and calls of them within a conversation: their one form, and what a text leaves out of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sampo_ray.sources.messages import Message, Unusable

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of the functions that answers may call."""

UNNAMED = "tools that are not named functions"
KNOWN = frozenset(("role", "content", "tool_calls", "tool_call_id", "name"))
"""Keys of a turn that chat templates are known to take."""


def as_requested(tools: Tools) -> list[dict[str, Any]]:
    """Tools as vLLM hands those of a request to the chat template. Raises Unusable."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def with_calls(message: Message) -> bool:
    """Whether a turn calls tools or is what one returned."""
    return bool(message.get("tool_calls")) or message["role"] == "tool"


def left_out(message: Message, text: str) -> bool:
    """Whether `text` lacks something of a turn: its words, the names of its calls, or one of their arguments."""
    return not all(_is_in(text, value) for value in _values(message))


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise Unusable(UNNAMED)
    if not isinstance(name := function.get("name"), str) or not name:
        raise Unusable(UNNAMED)
    parameters = function.get("parameters", function.get("input_schema"))  # the latter is Anthropic's
    others = {k: v for k, v in function.items() if k not in ("name", "description", "parameters", "input_schema")}
    if function is tool:
        others.pop("type", None)
    return {"name": name, "description": function.get("description"), "parameters": parameters} | others


def _values(message: Message) -> Iterator[object]:
    yield message["content"].rpartition("</think>")[2]  # templates leave out what earlier turns thought
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _leaves(call["function"].get("arguments"))


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _is_in(text: str, value: object) -> bool:
    """Whether a text holds a value in one of the ways in which templates write it: as it is, as JSON, as Python."""
    if isinstance(value, str):
        escaped = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        return value.strip() in text or any(each in text for each in escaped)
    return json.dumps(value) in text or str(value) in text
