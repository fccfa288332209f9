"""Conversations as turns, in the one form that the rest of the program knows, from every form that data has them in."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sampo_ray.sources.calls import calls_of, result_text
from sampo_ray.sources.parts import Content, content_of, is_nothing, refuse_extras, snake
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.templated import plain, templated
from sampo_ray.sources.transcripts import Piece, transcript
from sampo_ray.sources.unusable import PREFIX, ROLES, SPELLED, TEXTLESS, TRANSCRIPT, UNICODE, UNREADABLE, Unusable

__all__ = ["Message", "Unusable", "alternating", "turns_of", "unicode_of"]

Message = dict[str, Any]
"""One turn: {"role": "system" | "user" | "assistant" | "tool", "content": text}, and where a turn has them
"tool_calls" (OpenAI's form, arguments as objects), "tool_call_id" and "name"."""

Role = Literal["user", "assistant"]

_ROLES = {
    name: role
    for role, names in {
        "system": "system developer sys system_prompt system_message",
        "user": "user human prompter customer client usr human_message user_message",
        "assistant": "assistant gpt ai bot chatgpt model chatbot agent llm bing bard claude gemini ai_message "
        "assistant_message",
        "tool": "tool function observation ipython tool_response function_response tool_result tool_message "
        "function_message",
        "calls": "function_call tool_call tool_calls",  # an assistant's turn that is a call
    }.items()
    for name in names.split()
}
_SIDES = _ROLES | {
    **dict.fromkeys(("input", "instruction", "question", "prompt", "query"), "user"),
    **dict.fromkeys(("output", "response", "answer", "completion"), "assistant"),
}
"""Whose turn a key without a role names, as in `{input, output}`."""

_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "parts", "refusal")
_CALL_KEYS = ("tool_calls", "function_call")
_KNOWN = (*_ROLE_KEYS, "type", *_CONTENT_KEYS, *_CALL_KEYS, "tool_call_id", "tool_name", "name")
_LISTS = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog")
_BEGUN = re.compile(r"\s*(?:\[\s*)?\{\s*['\"](?:role|from)['\"]\s*:")


def turns_of(value: object, role: Role, behind: object = None) -> list[Message]:
    """The turns that a column's `value` holds; plain text is one turn of `role`. Raises Unusable.

    Read are: text; transcripts (`Human: ... Assistant:`) and templated text (ChatML, Llama, ...), split into turns;
    one message or a list of them with `role`/`content`, `from`/`value` and the like, other usual names of roles, and
    content in parts; `{input, output}` turns; lists of `[question, answer]` and of `[role, text]`; messages as JSON, or
    as Python writes them, in a string.

    `behind` is what the prompt's column holds. If that is a text that ends with an open turn of the assistant, an
    answer goes on in it, and ends where a turn ends in such texts. A user's turns do not end with an empty turn of the
    assistant, nor an assistant's with one of the user. Other texts are kept as they are, white space included, but for
    an end-of-turn mark behind an answer.
    """
    value = _python(value)
    value = _spelled(unicode_of(value)) if isinstance(value, str) else value
    if isinstance(value, str):
        turns = _text_turns(value, role, behind)
    elif isinstance(value, dict):
        turns = _message_turns(value) if _role_of(value) else _roleless_turns(value, role)
    elif isinstance(value, list):
        turns = _list_turns(value)
    else:
        raise Unusable(UNREADABLE)
    other = "user" if role == "assistant" else "assistant"
    while turns and turns[-1]["role"] == other and not turns[-1]["content"].strip() and "tool_calls" not in turns[-1]:
        turns.pop()
    return turns


def alternating(texts: Sequence[object]) -> list[Message]:
    """Plain texts as turns, the user's first. Raises Unusable."""
    if not all(isinstance(text, str) for text in texts):
        raise Unusable(UNREADABLE)
    return [_turn(("user", "assistant")[number % 2], str(text)) for number, text in enumerate(texts)]


def unicode_of(text: str) -> str:
    """The text, unless it has a lone surrogate: JSON can spell those, tokenizers and Arrow strings cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(UNICODE) from None
    return text


def _text_turns(text: str, role: Role, behind: object) -> list[Message]:
    pieces = _split(text)
    if pieces is None and role == "assistant" and isinstance(behind, str):
        pieces = _continued(unicode_of(behind), text)
    if pieces is None:
        return [_turn(role, text)]
    last = pieces[-1]
    if role == "user" and last.role == "assistant" and last.text.strip() and not last.closed:
        raise Unusable(PREFIX)
    return [_turn(piece.role, piece.text) for piece in pieces]


def _split(text: str, more: str = "") -> list[Piece] | None:
    pieces = templated(text, more)
    return transcript(text, more) if pieces is None else pieces


def _continued(behind: str, text: str) -> list[Piece] | None:
    """The turns of an answer that goes on in a prompt's text; None if nothing is open there."""
    try:
        asked = _split(behind)
    except Unusable:
        return None  # it is refused where it is read as the prompt
    if asked is None or asked[-1].role != "assistant" or asked[-1].text.strip():
        return None
    whole = _split(behind, text)
    if whole is None or whole[: len(asked) - 1] != asked[:-1]:
        raise Unusable(TRANSCRIPT)
    return whole[len(asked) - 1 :]


def _turn(role: str, text: str, **more: object) -> Message:
    text = plain(unicode_of(text), role)
    return {"role": role, "content": text, **more}


def _list_turns(values: Sequence[object]) -> list[Message]:
    pairs = [each for each in values if isinstance(each, list) and len(each) == 2]
    if values and len(pairs) == len(values):
        if all(isinstance(name, str) and snake(name) in _ROLES for name, _ in pairs):
            return [turn for name, content in pairs for turn in _message_turns({"role": name, "content": content})]
        return [turn for question, answer in pairs for turn in _exchange({"question": question, "answer": answer})]
    if not all(isinstance(each, dict) for each in values):
        raise Unusable(UNREADABLE)
    turns = list[Message]()
    for each in values:
        turns += _message_turns(each) if _role_of(each) else _exchange(each)  # type: ignore[arg-type]  # all are
    return turns


def _roleless_turns(value: Mapping[str, Any], role: Role) -> list[Message]:
    """Turns of an object without a role: a conversation in one of its keys or as columns, an exchange, or a text."""
    for key in _LISTS:
        if isinstance(value.get(key), list):
            refuse_extras(value, (key,))
            return _list_turns(value[key])
    if isinstance(value.get("role") or value.get("from"), list):  # what `datasets` makes of a sequence of structs
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) > 1:
            raise Unusable(UNREADABLE)
        return _list_turns([dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)])
    if any(isinstance(value.get(key), str) for key in _CONTENT_KEYS):
        return _message_turns({**value, "role": role})
    return _exchange(value)


def _exchange(value: Mapping[str, Any]) -> list[Message]:
    """The turns of an object whose keys say who speaks, as `{input, output}`."""
    said = {key: text for key, text in value.items() if snake(key) in _SIDES and not is_nothing(text)}
    by_role = {_SIDES[snake(key)]: text for key, text in said.items()}
    if not said:
        raise Unusable(ROLES)
    if len(by_role) < len(said) or not by_role.keys() <= {"system", "user", "assistant"}:
        raise Unusable(UNREADABLE)
    refuse_extras(value, tuple(said))
    roles = [role for role in ("system", "user", "assistant") if role in by_role]
    return [turn for role in roles for turn in _message_turns({"role": role, "content": by_role[role]})]


def _message_turns(message: Mapping[str, Any]) -> list[Message]:
    """The turns of one message: one, but for results of tools that come as parts of a user's message."""
    message = _unwrapped(message)
    role = _ROLES.get(snake(_role_of(message)))
    if role is None:
        raise Unusable(ROLES)
    given = _given(message)
    content = Content([result_text(given)]) if role == "tool" and isinstance(given, dict) else Content()
    if role == "calls":
        role, content.calls = "assistant", calls_of(message if given is None else given)
    elif not content.texts:
        content = content_of(given)
    for key in _CALL_KEYS:
        if not is_nothing(message.get(key)):
            content.calls += calls_of(message[key])
    refuse_extras(message, _KNOWN)
    turns = [_turn(each.pop("role"), each.pop("content"), **each) for each in content.results]
    if content.text is None and not content.calls:
        if turns:
            return turns
        raise Unusable(TEXTLESS)
    if content.calls and role != "assistant":
        raise Unusable(ROLES)
    text = content.text or ""
    if re.match(r"\n\nHuman:.*\n\nAssistant:", text, re.DOTALL):  # a conversation within a turn
        raise Unusable(TRANSCRIPT)
    return [*turns, _turn(role, text, **_fields(message, role, content.calls))]


def _fields(message: Mapping[str, Any], role: str, calls: list[dict[str, Any]]) -> dict[str, object]:
    """What a turn has besides its text. An assistant's name is the model's in most data, and is left out."""
    name = message.get("name") or message.get("tool_name")
    found = {
        "tool_calls": calls,
        "tool_call_id": message.get("tool_call_id") if role == "tool" else None,
        "name": name if role != "assistant" and isinstance(name, str) else None,
    }
    return {key: held for key, held in found.items() if held}


def _given(message: Mapping[str, Any]) -> object:
    """What a message's content is: the one key of those it may be in, or several that say the same."""
    found = [held for key in _CONTENT_KEYS if not is_nothing(held := message.get(key))]
    if any(each != found[0] for each in found):
        raise Unusable(UNREADABLE)
    return found[0] if found else next((held for key in _CONTENT_KEYS if (held := message.get(key)) is not None), None)


def _role_of(message: Mapping[str, Any]) -> str:
    """The name of the role that a message says it has; "" if it says none."""
    for key in _ROLE_KEYS:
        held = message.get(key)
        held = held.get("role") if isinstance(held, dict) else held  # an export of ChatGPT
        if isinstance(held, str) and held.strip():
            return held
    kind = _unwrapped(message).get("type")  # LangChain
    return kind if isinstance(kind, str) and snake(kind) in _ROLES else ""


def _unwrapped(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of LangChain as its own keys, which it stores under `data` or `kwargs`."""
    inner, named = message.get("data") or message.get("kwargs"), message.get("id")
    if not isinstance(inner, dict) or not (set(message) <= {"type", "data", "lc", "id", "kwargs"}):
        return message
    kind = named[-1] if isinstance(named, list) and named else message.get("type")
    return {**inner, "type": kind}


def _python(value: object) -> Any:
    """Lists and dictionaries for what Arrow and NumPy leave of them."""
    if isinstance(value, str):
        return value
    for method in ("as_py", "tolist"):
        if hasattr(value, method):
            value = getattr(value, method)()
    if isinstance(value, Mapping):
        return {str(key): _python(each) for key, each in value.items()}
    return [_python(each) for each in value] if isinstance(value, list | tuple) else value


def _spelled(text: str) -> object:
    """The messages that a text spells, as JSON or as Python writes them; the text itself if it spells none."""
    begun = text.lstrip()[:1]
    if begun not in ("[", "{") or (not text.rstrip().endswith(("]", "}")) and not _BEGUN.match(text)):
        return text
    value = spelled(text)
    if value is not text:
        return value if _is_conversation(value) else text
    if _BEGUN.match(text):
        raise Unusable(SPELLED)
    return text


def _is_conversation(value: object) -> bool:
    """Whether objects are meant as messages, even such as cannot be read: each says who speaks and has a content."""
    if isinstance(value, dict) and (held := next((value[key] for key in _LISTS if key in value), None)):
        value = held
    given = value if isinstance(value, list) else [value]
    messages = [each for each in given if isinstance(each, dict) and _role_of(each)]
    if not messages or len(messages) < len(given):
        return False
    known = any(snake(_role_of(each)) in _ROLES for each in messages)
    named = all("role" in each and "content" in each for each in messages)
    contents = all(each.keys() & {*_CONTENT_KEYS, *_CALL_KEYS, "data", "kwargs"} for each in messages)
    return contents and (known or named)
