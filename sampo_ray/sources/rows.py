"""The rows of a data source: prompts and preference pairs in the layouts that users write."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError
from sampo_ray.sources.answers import paths_of, pick
from sampo_ray.sources.conversations import EMPTY_ANSWER, NO_PROMPT, answered, asked, checked, filled, tools_of
from sampo_ray.sources.lost import Lost
from sampo_ray.sources.messages import Message, turns_of
from sampo_ray.sources.paths import at
from sampo_ray.sources.reading import Kind, begins, choose, several_words, shared_beginning
from sampo_ray.sources.records import Record, read_records
from sampo_ray.sources.transcripts import names_speakers
from sampo_ray.sources.unfolding import unfolded
from sampo_ray.sources.unusable import TRANSCRIPT, Unusable

__all__ = ["Counts", "Kind", "Row", "first_rows", "read_rows", "rows_of"]

PROBED = 1000
"""Rows in which the columns of a source are found."""

NO_ANSWER = "no chosen or no rejected"
DIFFERENT = "chosen and rejected answer different prompts"
SEVERAL = "chosen and rejected part before their last turn"
IDENTICAL = "identical responses"
REPEATED = "answers that repeat the prompt"

_ANSWERS = {"prompt", "messages", "chosen", "rejected"}
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


def cut_to_length(prompts: int, questions: int, responses: int) -> str:
    """What was cut, for people: how many prompts, of these how many within their last question, and responses."""
    within = f" ({questions} of them within the last question, the others by whole turns)" if questions else ""
    return f"cut to length: {prompts} prompts{within}, {responses} responses"


@dataclass
class Counts:
    """How many rows of a source were read, dropped and cut; filled while the source is read."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    questions_cut: int = 0  # prompts whose last question lost its beginning, of those that are cut
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
        self.questions_cut += others.questions_cut
        self.responses_cut += others.responses_cut
        self.first = {**others.first, **self.first}

    def nothing_usable(self, source: str, kind: Kind) -> DataError:
        """The error for a source without a usable row."""
        if not self.rows:
            return DataError(f"data source {source!r}: holds no rows; {_EXPECTED[kind]}")
        reasons = ", ".join(f"{why}: {n} (first at {self.first[why]})" for why, n in self.dropped.most_common())
        return DataError(f"data source {source!r}: no usable row among {self.rows} ({reasons}); {_EXPECTED[kind]}")


def read_rows(source: str, kind: Kind, counts: Counts | None = None, columns: Columns | None = None) -> Iterator[Row]:
    """Streams the usable rows of `source`, read as `columns` says, what is missing there being found in its first rows;
    counts the others by reason in `counts`.

    DataError for a source that cannot be read, or of which it is not known how, and for a line that is not valid JSON.
    """
    columns = columns_of(source, kind, columns or Columns())
    yield from rows_of(unfolded(read_records(source), columns), kind, columns, Counts() if counts is None else counts)


def columns_of(source: str, kind: Kind, given: Columns) -> Columns:
    """How the rows of a source are read: what is given, and what is found in its first rows. DataError."""
    if given.complete:
        return given
    records = list(itertools.islice(read_records(source), PROBED))
    if not records:
        raise Counts().nothing_usable(source, kind)
    try:
        return choose(records, kind, given)
    except DataError as error:
        raise type(error)(f"data source {source!r}: {error}") from None


def rows_of(records: Iterable[Record], kind: Kind, columns: Columns, counts: Counts) -> Iterator[Row]:
    """The usable ones of `records`, which are `unfolded` already, read as `columns` says; the others are counted by
    reason in `counts`. A row's id is its position in the source.
    """
    lost = Lost(columns, kind)
    used = _used(columns)
    for record in records:
        counts.rows += 1
        try:
            prompt, chosen, rejected = (_pair if kind == "pairs" else _prompt)(record.values, columns)
            tools = tools_of(record.values, columns)
            lost.refuse(record.values, [*prompt, *(each for each in (chosen, rejected) if each)])
        except Unusable as reason:
            counts.drop(str(reason), record.where)
            continue
        others = {name: value for name, value in record.values.items() if name not in used}
        yield Row(record.position, record.where, prompt, chosen, rejected, others, tools)


def first_rows(source: str, kind: Kind, most: int) -> list[Row]:
    """Opens `source` and returns its first usable rows, 1 to `most`. DataError if there is none near its beginning."""
    counts = Counts()
    rows = list(itertools.islice(read_rows(source, kind, counts), most))
    if not rows:
        raise counts.nothing_usable(source, kind)
    return rows


def _used(columns: Columns) -> set[str]:
    """The columns that reward functions do not get: what rows are read from, and answers."""
    fields = ("prompt", "input", "system", "history", "tools", "chosen", "rejected", "answers")
    return {path.split(".")[0] for field in fields for path in paths_of(getattr(columns, field))} | _ANSWERS


def _pair(values: Mapping[str, object], columns: Columns) -> tuple[list[Message], Message, Message]:
    before = asked(values, columns)
    better, worse = pick(values, columns)
    if not filled(better) or not filled(worse):
        missing = better is None or worse is None
        raise Unusable(NO_ANSWER if missing else EMPTY_ANSWER)
    before, better, worse = _beginning(before, better, worse, columns)
    behind = at(values, columns.prompt) if columns.prompt is not None else None
    turns = [turns_of(value, "assistant", behind) for value in (better, worse)]
    if before and before[-1] in (turns[0][-1:] + turns[1][-1:]) and turns[0][:-1] in ([], before[:-1]):
        before = before[:-1]  # a conversation with its answer
    chosen = answered(before, turns[0])
    alone = not before and len(turns[1]) == 1
    rejected = answered(chosen[:-1] if alone else before, turns[1])
    if not before and len(turns[0]) == 1:
        chosen = answered(rejected[:-1], turns[0])
    prompt, other = checked(chosen[:-1]), rejected[:-1]
    if prompt != other:
        shared = [message for message, its in zip(prompt, other, strict=False) if message == its]
        raise Unusable(SEVERAL if any(message["role"] != "system" for message in shared) else DIFFERENT)
    for answer in (chosen[-1], rejected[-1]):
        if not answer["content"].strip() and not answer.get("tool_calls"):
            raise Unusable(EMPTY_ANSWER)
    if chosen[-1] == rejected[-1]:
        raise Unusable(IDENTICAL)
    return prompt, chosen[-1], rejected[-1]


def _beginning(before: list[Message], better: Any, worse: Any, columns: Columns) -> tuple[list[Message], Any, Any]:
    """Answers in text without the prompt that both of them begin with."""
    if not isinstance(better, str) or not isinstance(worse, str):
        return before, better, worse
    if columns.beginning == "shared":
        if not (start := shared_beginning(better, worse)):
            raise Unusable(NO_PROMPT)
        begun, answers = turns_of(start, "user"), (better[len(start) :], worse[len(start) :])
        if len(begun) == 1 and names_speakers(start):
            raise Unusable(TRANSCRIPT)
        better, worse = (turns_of(answer, "assistant", behind=start) for answer in answers)
        return [*before, *begun], better, worse
    text = str(before[-1]["content"]).strip() if len(before) else ""
    if not text or not several_words(text) or not (begins(better, text) and begins(worse, text)):
        return before, better, worse
    if columns.beginning != "prompt":
        raise Unusable(REPEATED)
    return before, better.lstrip()[len(text) :].lstrip(), worse.lstrip()[len(text) :].lstrip()


def _prompt(values: Mapping[str, object], columns: Columns) -> tuple[list[Message], None, None]:
    turns = asked(values, columns)
    if columns.chosen not in (None, columns.prompt) and filled(value := at(values, str(columns.chosen))):
        behind = at(values, columns.prompt) if columns.prompt is not None else None
        turns = answered(turns, turns_of(value, "assistant", behind))
    return checked(turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns), None, None
