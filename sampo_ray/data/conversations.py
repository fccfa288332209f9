"""Rows as they are asked and answered: written by the chat template, cut to the limits, in token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sampo_ray.config.sections import DataConfig
from sampo_ray.data.cutting import Shortened, shortened
from sampo_ray.data.template import EMPTY, SAME, TOO_LONG, Asked
from sampo_ray.sources.messages import Message, Unusable
from sampo_ray.sources.rows import Counts, Row

if TYPE_CHECKING:
    from sampo_ray.data.chat import ChatFormat


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row's answers follow: its messages as they are asked, and their token ids from BOS to the answer's header.

    `cut` says what was taken away, if anything was.
    """

    row: Row
    asked: Asked
    ids: list[int]
    cut: Shortened | None


@dataclass(frozen=True, slots=True)
class Answers:
    """A pair: token ids of whole answers with the end-of-turn token, and how many of each are used."""

    prompt: Prompt
    chosen: list[int]
    rejected: list[int]
    limit: int


def prompts_of(rows: Iterable[Row], chat: "ChatFormat", limit: int, counts: Counts) -> list[Prompt]:
    """The prompts of the rows that the chat template takes, of at most `limit` tokens each; others are counted."""
    asked = list[tuple[Row, Asked]]()
    for row in rows:
        try:
            asked.append((row, chat.asked(row.prompt, row.tools)))
        except Unusable as reason:
            counts.drop(str(reason), row.where)
    prompts = []
    for (row, each), ids in zip(asked, chat.encode_prompts([each.text for _, each in asked]), strict=True):
        if len(ids) <= limit:
            prompts.append(Prompt(row, each, ids, None))
        elif (prompt := _shortened(row, chat, limit)) is None:
            counts.drop(TOO_LONG, row.where)
        else:
            counts.prompts_cut += 1
            counts.questions_cut += prompt.cut is not None and prompt.cut.lost_characters > 0
            prompts.append(prompt)
    return prompts


def answered(prompts: Sequence[Prompt], chat: "ChatFormat", data: DataConfig, counts: Counts) -> list[Answers]:
    """The pairs whose answers the chat template writes and `data.max_length` leaves different; others are counted."""
    kept, texts = list[Prompt](), list[tuple[Message, str]]()
    for prompt in prompts:
        chosen, rejected = prompt.row.chosen, prompt.row.rejected
        assert chosen is not None and rejected is not None, "read as pairs"
        try:
            texts += [(answer, chat.response(prompt.asked, answer)) for answer in (chosen, rejected)]
            kept.append(prompt)
        except Unusable as reason:
            counts.drop(str(reason), prompt.row.where)
    ids, pairs = chat.encode_answers(texts), list[Answers]()
    for prompt, best, worst in zip(kept, ids[::2], ids[1::2], strict=True):
        limit = data.max_length - len(prompt.ids)
        if len(best) < 2 or len(worst) < 2:  # only the end-of-turn token
            counts.drop(EMPTY, prompt.row.where)
        elif best[:limit] == worst[:limit]:
            counts.drop(SAME, prompt.row.where)
        else:
            counts.responses_cut += (len(best) > limit) + (len(worst) > limit)
            pairs.append(Answers(prompt, best, worst, limit))
    return pairs


def _shortened(row: Row, chat: "ChatFormat", limit: int) -> Prompt | None:
    """The prompt of a row that is too long; None where it cannot be cut so that it fits."""

    def length(messages: list[Message]) -> int | None:
        try:
            [ids] = chat.encode_prompts([chat.asked(messages, row.tools).text])
        except Unusable:
            return None
        return len(ids)

    cut = shortened(row.prompt, limit, length, chat.token_starts)
    if cut is None:
        return None
    asked = chat.asked(cut.messages, row.tools)
    return Prompt(row, asked, chat.encode_prompts([asked.text])[0], cut)
