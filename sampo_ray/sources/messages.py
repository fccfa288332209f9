"""Conversations as turns, in the one form that the rest of the program knows."""

from typing import Any, Literal

from sampo_ray.sources.unusable import ROLES, TEXTLESS, UNICODE, UNREADABLE, Unusable

__all__ = ["Message", "Unusable", "message_of", "messages_of", "turns_of", "unicode_of"]

Message = dict[str, Any]
"""One turn: {"role": "system" | "user" | "assistant" | "tool", "content": text}, and where a turn has them
"tool_calls" (OpenAI's form, arguments as objects), "tool_call_id" and "name"."""


def turns_of(value: object, role: Literal["user", "assistant"]) -> list[Message]:
    """The turns that a column's `value` holds; text is one turn of `role`. Raises Unusable."""
    if isinstance(value, str):
        return [message_of(role, value)]
    return messages_of([value] if isinstance(value, dict) else value)


def message_of(role: object, content: object) -> Message:
    """A turn with that role and text. Raises Unusable."""
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise Unusable(ROLES)
    if not isinstance(content, str):
        raise Unusable(TEXTLESS)
    return {"role": role, "content": unicode_of(content)}


def messages_of(value: object) -> list[Message]:
    """A list of turns. Raises Unusable."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable(UNREADABLE)
    return [message_of(message.get("role"), message.get("content")) for message in value]


def unicode_of(text: str) -> str:
    """The text, unless it has a lone surrogate: JSON can spell those, tokenizers and Arrow strings cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(UNICODE) from None
    return text
