"""What is evaluated: one version behind an endpoint, and how its answers are read."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.template import opened_by, thinking_in
from sampo_ray.evaluation.records import Conditions, Score, TaskResult
from sampo_ray.sources.messages import Message


@dataclass(frozen=True)
class Subject:
    """A version behind an endpoint that speaks OpenAI's protocol as ours does, and how it is asked."""

    url: str
    """`/v1/...` is appended to it."""
    model: str
    """`policy@3`."""
    tokenizer: str
    """Local folder with the tokenizer and the chat template."""
    context: int
    """Tokens of a prompt with its answer, at most."""
    label: str
    name: str
    """Base model of the run, or the folder's name: `TaskResult.model`."""
    run: str | None = None
    version: int | None = None
    """Each answer must name these two in its headers; None: the endpoint serves a folder."""
    dtype: str | None = None
    """Of the weights."""
    concurrency: int = 32
    """Requests in flight."""
    timeout_s: float = 900.0
    """Of a request, with its time in queues."""
    key: str | None = field(default=None, repr=False)

    def chat(self) -> ChatFormat:
        return ChatFormat.load(self.tokenizer, "tokenizer")

    def result(self, task: str, scores: tuple[Score, ...], conditions: Conditions, begun: float) -> TaskResult:
        """The result of a task that has just ended, and had `begun` at that time of the monotonic clock."""
        return TaskResult(
            task=task,
            run=self.run,
            version=self.version,
            label=self.label,
            model=self.name,
            scores=scores,
            conditions=conditions,
            seconds=time.monotonic() - begun,
            created=int(time.time()),
        )


def template_digest(chat: ChatFormat) -> str:
    """Of the chat template: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()[:16]


def leading_bos(chat: ChatFormat) -> int | None:
    """The BOS that a text begins with for this model: where its tokenizer adds one, or its chat template begins with
    it. None if there is none. A token that opens each turn (ChatML's) is no BOS, whatever the tokenizer calls it."""
    bos = chat.bos_id
    if bos is None:
        return None
    if chat.tokenizer("a").input_ids[:1] == [bos]:
        return bos
    turns: list[Message] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    ids = chat.prompt_ids(turns)
    return bos if ids[0] == bos and ids.count(bos) == 1 else None


def bos_in(prompt: Sequence[int], chat: ChatFormat) -> int:
    """How many of a prompt's tokens are `leading_bos`."""
    bos = leading_bos(chat)
    return 0 if bos is None else list(prompt).count(bos)


class Thinking:
    """How a model marks its thinking. False if its chat template knows of none; marks in an answer count even then."""

    def __init__(self, chat: ChatFormat) -> None:
        prompt = chat.turn.prompt
        self._opened = opened_by(prompt) is not None
        self._marks = opened_by(prompt) or thinking_in(str(chat.tokenizer.chat_template))
        self._chat = chat
        special = {str(each) for each in chat.tokenizer.added_tokens_decoder.values() if each.special}
        self._close_id: int | None = None
        if self._marks and self._marks[1] in special:  # the endpoint's text leaves special tokens out
            self._close_id = chat.tokenizer.get_vocab()[self._marks[1]]

    def __bool__(self) -> bool:
        return self._marks is not None

    def after(self, text: str, ids: Sequence[int]) -> str:
        """An answer without its thinking; "" where the thinking has not ended."""
        if self._close_id is not None:
            if self._close_id in ids:
                last = max(position for position, each in enumerate(ids) if each == self._close_id)
                return self._chat.text(ids[last + 1 :]).strip()
            return "" if self._opened else text
        marks = self._marks or (thinking_in(text) if text.lstrip()[:1] in ("<", "[", "◁") else None)
        if marks is None:
            return text
        _, close, answer = text.rpartition(marks[1])
        if close:
            return answer.strip()
        return "" if self._opened or text.lstrip().startswith(marks[0]) else text
