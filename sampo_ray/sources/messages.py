"""One turn of a conversation, in the one form that the rest of the program knows."""

from typing import Any

Message = dict[str, Any]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""


class Unusable(Exception):
    """A row or prompt that is dropped; the message is the reason it is counted under."""


def message_of(role: object, content: object) -> Message:
    """A turn with that role and text. Raises Unusable."""
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise Unusable("wrong roles")
    if not isinstance(content, str):
        raise Unusable("a message without text")
    return {"role": role, "content": unicode_of(content)}


def messages_of(value: object) -> list[Message]:
    """A list of turns. Raises Unusable."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("neither text nor a list of messages")
    return [message_of(message.get("role"), message.get("content")) for message in value]


def unicode_of(text: str) -> str:
    """The text, unless it has a lone surrogate: JSON can spell those, tokenizers and Arrow strings cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("not valid Unicode") from None
    return text
