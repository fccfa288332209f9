"""Tool calls and their results, from the forms of APIs and data sets to OpenAI's with objects as arguments.

Chat templates want arguments as objects; vLLM hands them over as such. In a column of Parquet each call has the keys of
all calls, as null where it has none: a null in arguments that are an object is nothing.
"""

import json
from typing import Any

from sampo_ray.sources.unusable import CALLS, Unusable

_TYPES = (None, "function", "function_call", "tool_call", "tool_use")
_NESTED = ("function", "functionCall", "function_call", "toolUse")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def calls_of(value: object) -> list[dict[str, Any]]:
    """One call or a list of them, or either as JSON in a string; a call may be nested as OpenAI's `function`, Gemini's
    `functionCall` or Bedrock's `toolUse`. Raises Unusable.
    """
    value = _parsed(value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Unusable(CALLS)
    return [_call(each) for each in calls]


def result_text(value: object) -> str:
    """What a tool returned, as text: JSON for what is none."""
    return value if isinstance(value, str) else json.dumps(without_nulls(value), ensure_ascii=False, default=str)


def without_nulls(value: object) -> Any:
    """A value without the keys that are null in it, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _call(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") not in _TYPES:
        raise Unusable(CALLS)
    inner = next((value[key] for key in _NESTED if value.get(key)), value)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        raise Unusable(CALLS)
    arguments: Any = next((inner[key] for key in _ARGUMENTS if inner.get(key)), {})
    arguments = _parsed(arguments) if isinstance(arguments, str) else without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise Unusable(CALLS)
    call_id = value.get("id") or inner.get("toolUseId") or inner.get("id")
    call: dict[str, Any] = {"id": call_id} if isinstance(call_id, str) else {}
    return call | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable(CALLS) from None
