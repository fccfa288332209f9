"""A row as it was understood, for people: its turns and answers, their tokens, and what of them is cut."""

import json
from dataclasses import dataclass

from sampo_ray.config.sections import DataConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.conversations import answered, prompts_of
from sampo_ray.data.cutting import Shortened
from sampo_ray.sources.messages import Message
from sampo_ray.sources.rows import Counts, Row


@dataclass(frozen=True)
class Part:
    """A turn of the prompt, the tools, or an answer: its text, the tokens of that, and in words what of it is cut."""

    role: str
    text: str
    tokens: int
    cut: str = ""


@dataclass(frozen=True)
class FirstRow:
    """What a row became; `size` says how many tokens the model reads, the chat template's among them."""

    where: str
    parts: list[Part]
    size: str


def understood(row: Row, chat: ChatFormat, data: DataConfig) -> FirstRow:
    """A row that can be used, as it is tokenized with the limits of `data`."""
    counts = Counts()
    [prompt] = prompts_of([row], chat, data.prompt_limit, counts)
    cut = f", cut: without {_lost(prompt.cut)}" if prompt.cut else ""
    size = f"with the template: prompt {len(prompt.ids):,} (at most {data.prompt_limit:,}{cut})"
    parts = [*_tools(row, chat), *(_turn(message, chat) for message in prompt.asked.messages)]
    if row.chosen is None or row.rejected is None:
        return FirstRow(row.where, parts, size)
    [pair] = answered([prompt], chat, data, counts)
    for role, answer, ids in (("chosen", row.chosen, pair.chosen), ("rejected", row.rejected, pair.rejected)):
        kept = ids[: pair.limit]
        parts.append(_answer(role, answer, ids, kept, chat))
        size += f", with {role} {len(prompt.ids) + len(kept):,}"
    return FirstRow(row.where, parts, f"{size} (at most {data.max_length:,})")


def _lost(cut: Shortened) -> str:
    """What a prompt lost, in words."""
    turns = f"{cut.lost_turns:,} earlier turns" if cut.lost_turns else ""
    text = f"the first {cut.lost_characters:,} characters of its last question" if cut.lost_characters else ""
    return " and ".join(filter(None, (turns, text)))


def _tools(row: Row, chat: ChatFormat) -> list[Part]:
    if not row.tools:
        return []
    text = json.dumps(row.tools, ensure_ascii=False)
    return [Part("tools", text, _tokens(text, chat))]


def _turn(message: Message, chat: ChatFormat) -> Part:
    text = text_of(message)
    return Part(message["role"], text, _tokens(text, chat))


def _answer(role: str, answer: Message, ids: list[int], kept: list[int], chat: ChatFormat) -> Part:
    if len(kept) == len(ids):
        return Part(role, text_of(answer), len(ids))
    return Part(role, chat.text(kept), len(ids), f"cut here: {len(ids) - len(kept):,} tokens go on")


def text_of(message: Message) -> str:
    """A turn's text, with what else it has behind it."""
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return "\n".join(filter(None, (message["content"], json.dumps(others, ensure_ascii=False) if others else "")))


def _tokens(text: str, chat: ChatFormat) -> int:
    return len(chat.encode_prompts([text])[0])
