"""One conversation from the columns of a row: what is asked, and an answer behind it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sampo_ray.config.columns import Columns
from sampo_ray.sources.messages import Message, turns_of, unicode_of
from sampo_ray.sources.paths import at
from sampo_ray.sources.unusable import PREFIX, ROLES, UNREADABLE, Unusable

CONTRADICTS = "a prompt that is no turn of the answers' conversation"
TWO_SYSTEMS = "system prompts that differ"
EARLIER = "earlier turns that cannot be told apart"
NO_PROMPT = "no prompt"
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty response"
TOOLS_UNREADABLE = "tools that are no JSON schemas"


def filled(value: object) -> bool:
    """Whether a column has something in a row: no null, no NaN, no blank text, no empty list or object."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and not (isinstance(value, Sequence | Mapping) and not value)


def holds(value: object) -> bool:
    """Whether a column says something: it is `filled`, and no empty list or object as JSON in a text."""
    return filled(value) and not (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def asked(values: Mapping[str, object], columns: Columns) -> list[Message]:
    """The turns before the answer, as the columns other than the answers' have them: the system turn, earlier turns,
    the prompt. Raises Unusable.
    """
    turns = _turns(values, columns.prompt)
    if columns.input is not None and holds(text := at(values, columns.input)):
        turns = _with_input(turns, text)
    if columns.history is not None and holds(value := at(values, columns.history)):
        earlier = turns_of(value, "user")
        if isinstance(value, str) and len(earlier) == 1:
            raise Unusable(EARLIER)
        turns = _behind(earlier, turns)
    if columns.system is not None and holds(value := at(values, columns.system)):
        turns = _behind([{"role": "system", "content": _system_text(value)}], turns)
    return turns


def answered(before: list[Message], turns: list[Message]) -> list[Message]:
    """The whole conversation: what is `asked`, and the `turns` of a column with an answer, which go on behind it or
    repeat some of it. Raises Unusable.
    """
    first, before = _without_system(before)
    second, turns = _without_system(turns)
    if first and second and not _same(first, second):
        raise Unusable(TWO_SYSTEMS)
    system = first or second
    if not turns:
        raise Unusable(EMPTY_ANSWER)
    if turns[-1]["role"] != "assistant":
        raise Unusable(ROLES)
    return system + _whole(before, turns)


def checked(prompt: list[Message]) -> list[Message]:
    """A prompt that can be answered. Raises Unusable for any other."""
    if not prompt or (len(prompt) == 1 and prompt[0]["role"] == "system"):
        raise Unusable(NO_PROMPT)
    if prompt[-1]["role"] not in ("user", "tool") or any(message["role"] == "system" for message in prompt[1:]):
        raise Unusable(ROLES)
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise Unusable(EMPTY_PROMPT)
    return prompt


def tools_of(values: Mapping[str, object], columns: Columns) -> list[dict[str, Any]] | None:
    """The JSON schemas of the functions that answers may call; None if there are none. Raises Unusable."""
    value = None if columns.tools is None else at(values, columns.tools)
    if not holds(value):
        return None
    tools = [_json(tool) for tool in found] if isinstance(found := _json(value), list) else [found]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(TOOLS_UNREADABLE)
    return tools or None  # type: ignore[return-value]  # they are dictionaries


def _json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Unusable(TOOLS_UNREADABLE) from None


def _turns(values: Mapping[str, object], path: str | None) -> list[Message]:
    value = None if path is None else at(values, path)
    return [] if value is None or (isinstance(value, float) and math.isnan(value)) else turns_of(value, "user")


def _with_input(turns: list[Message], text: object) -> list[Message]:
    text = str(text) if isinstance(text, int | float) else text
    if not isinstance(text, str):
        raise Unusable(UNREADABLE)
    if text.lstrip()[:1] in ("[", "{") and [turn["content"] for turn in turns_of(text, "user")] != [text]:
        raise Unusable(UNREADABLE)  # messages as JSON
    if not turns:
        return turns_of(text, "user")
    if turns[-1]["role"] != "user":
        raise Unusable(ROLES)
    return [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}\n{unicode_of(text)}"}]


def _system_text(value: object) -> str:
    if isinstance(value, str):
        return unicode_of(value)
    turns = turns_of(value, "user")
    if len(turns) != 1:
        raise Unusable(UNREADABLE)
    return str(turns[0]["content"])


def _behind(earlier: list[Message], turns: list[Message]) -> list[Message]:
    """`turns` behind `earlier` ones, with one system turn in front. Turns that repeat the earlier ones are no more."""
    first, earlier = _without_system(earlier)
    second, turns = _without_system(turns)
    if first and second and not _same(first, second):
        raise Unusable(TWO_SYSTEMS)
    begins = len(turns) >= len(earlier) and _same(turns[: len(earlier)], earlier)
    return [*(first or second), *(turns if begins else earlier + turns)]


def _whole(before: list[Message], turns: list[Message]) -> list[Message]:
    prefix = turns[:-1]
    if not before or (prefix and len(before) == 1 and not before[0]["content"].strip()):
        return turns
    if turns[0]["role"] == "assistant":
        if before[-1]["role"] == "assistant":
            raise Unusable(PREFIX)
        return before + turns
    if len(turns) > len(before) and _same(turns[: len(before)], before):
        return turns
    if len(prefix) <= len(before) and _same(before[-len(prefix) :], prefix):
        return [*before, turns[-1]]
    users = [message for message in prefix if message["role"] == "user"]
    if len(before) == 1 and users and _same(before, users[-1:]):
        return turns
    if before[-1]["role"] == "assistant":
        return before + turns
    raise Unusable(CONTRADICTS)


def _without_system(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    has = bool(turns) and turns[0]["role"] == "system"
    return turns[:has], turns[has:]


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether turns say the same, but for space around it."""
    return len(some) == len(others) and all(
        {**one, "content": one["content"].strip()} == {**other, "content": other["content"].strip()}
        for one, other in zip(some, others, strict=True)
    )
