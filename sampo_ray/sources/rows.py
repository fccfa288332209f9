"""The rows of a data source: prompts and preference pairs in the layouts that users write."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.messages import Message, Unusable, messages_of, unicode_of
from sampo_ray.sources.records import Record, read_records

Kind = Literal["pairs", "prompts"]

_LAYOUT_COLUMNS = {"prompt", "messages", "chosen", "rejected"}
_EXPECTED = {
    "pairs": "write prompt, chosen and rejected, as strings or as lists of messages that end in the answer",
    "prompts": "write prompt as a string, or prompt or messages as a list of messages that ends with the user",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row. `chosen` and `rejected` are None where only prompts are read; `columns` are all other columns."""

    id: str
    where: str
    prompt: list[Message]
    chosen: Message | None
    rejected: Message | None
    columns: dict[str, object]
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions that the answers may call


@dataclass
class Counts:
    """How many rows of a source were read, dropped and cut; filled while the source is read."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    responses_cut: int = 0
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first row that was dropped for it

    @property
    def usable(self) -> int:
        return self.rows - self.dropped.total()

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def add(self, others: "Counts") -> None:
        """Counts the rows that `others` counts, too; they come after these."""
        self.rows += others.rows
        self.dropped += others.dropped
        self.prompts_cut += others.prompts_cut
        self.responses_cut += others.responses_cut
        self.first = {**others.first, **self.first}

    def nothing_usable(self, source: str, kind: Kind) -> DataError:
        """The error for a source without a usable row."""
        if not self.rows:
            return DataError(f"data source {source!r}: holds no rows; {_EXPECTED[kind]}")
        reasons = ", ".join(f"{why}: {n} (first at {self.first[why]})" for why, n in self.dropped.most_common())
        return DataError(f"data source {source!r}: no usable row among {self.rows} ({reasons}); {_EXPECTED[kind]}")


def read_rows(source: str, kind: Kind, counts: Counts | None = None, columns: Columns | None = None) -> Iterator[Row]:
    """Streams the usable rows of `source`, read as `columns` says; counts the others by reason in `counts`.

    DataError for a source that cannot be read, and for a line that is not valid JSON.
    """
    counts = Counts() if counts is None else counts
    return rows_of(read_records(source), kind, columns or Columns(), counts)


def rows_of(records: Iterable[Record], kind: Kind, columns: Columns, counts: Counts) -> Iterator[Row]:
    """The usable ones of `records`, read as `columns` says; the others are counted by reason in `counts`. A row's id is
    its position in the source.
    """
    parse = _parse_pair if kind == "pairs" else _parse_prompt
    for record in records:
        counts.rows += 1
        try:
            prompt, chosen, rejected = parse(record.values)
        except Unusable as reason:
            counts.drop(str(reason), record.where)
            continue
        others = {name: value for name, value in record.values.items() if name not in _LAYOUT_COLUMNS}
        yield Row(record.position, record.where, prompt, chosen, rejected, others)


def first_rows(source: str, kind: Kind, most: int) -> list[Row]:
    """Opens `source` and returns its first usable rows, 1 to `most`. DataError if there is none near its beginning."""
    counts = Counts()
    rows = list(itertools.islice(rows_of(itertools.islice(read_records(source), 1000), kind, Columns(), counts), most))
    if not rows:
        raise counts.nothing_usable(source, kind)
    return rows


def _parse_pair(values: Mapping[str, object]) -> tuple[list[Message], Message, Message]:
    chosen_prompt, chosen = _response(values.get("chosen"))
    rejected_prompt, rejected = _response(values.get("rejected"))
    if chosen_prompt and rejected_prompt and chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected answer different prompts")
    prompt = _whole_prompt(values.get("prompt"), chosen_prompt or rejected_prompt)
    if not chosen["content"].strip() or not rejected["content"].strip():
        raise Unusable("empty response")
    if chosen == rejected:
        raise Unusable("identical responses")
    return prompt, chosen, rejected


def _parse_prompt(values: Mapping[str, object]) -> tuple[list[Message], None, None]:
    prompt = values.get("prompt")
    if prompt is None and values.get("messages") is not None:
        messages = messages_of(values["messages"])
        prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if prompt is None and isinstance(values.get("chosen"), list):
        prompt, _ = _response(values["chosen"])
    return _whole_prompt(prompt, []), None, None


def _response(value: object) -> tuple[list[Message], Message]:
    """A chosen or rejected column as the messages before the answer (none for a string) and the answer."""
    if value is None:
        raise Unusable("no chosen or no rejected")
    if isinstance(value, str):
        return [], {"role": "assistant", "content": unicode_of(value)}
    messages = messages_of(value)
    if not messages:
        raise Unusable("empty response")
    if messages[-1]["role"] != "assistant":
        raise Unusable("wrong roles")
    return messages[:-1], messages[-1]


def _whole_prompt(prompt: object, prefix: list[Message]) -> list[Message]:
    """The prompt column, or the messages that chosen and rejected begin with (`prefix`)."""
    if isinstance(prompt, str):
        text = unicode_of(prompt)
        messages = prefix or [{"role": "user", "content": text}]
    elif prompt is None:
        messages = prefix
    else:
        messages = messages_of(prompt)
        if prefix and messages[-len(prefix) :] != prefix:
            raise Unusable("chosen and rejected answer different prompts")
    if not messages:
        raise Unusable("no prompt")
    if messages[-1]["role"] != "user" or any(message["role"] == "system" for message in messages[1:]):
        raise Unusable("wrong roles")
    if not messages[-1]["content"].strip():
        raise Unusable("empty prompt")
    return messages
