"""Users' votes on answers, how votes become preference pairs, and the journals that keep them.

A vote includes the answers that it is about, so it can be used after the answers are dropped. In a run directory:

    feedback/answers/     journal of the answers of the last `serve.feedback.keep_hours`
    feedback/votes/       journal of all votes
"""

import hashlib
import json
import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sampo_ray.errors import FeedbackError
from sampo_ray.run.lines import as_object
from sampo_ray.run.storage import Place

logger = logging.getLogger(__name__)
MERGE_AT = 64  # files of one time span that are merged before the span is over
ATTEMPTS = 5
VOTES_SPAN_S = 24 * 3600.0  # votes of a day are merged into one file
_SEGMENT = re.compile(r"\d+-\w+\.jsonl")

ResponseId = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Kind = Literal["better", "tie", "up", "down", "edited"]
FORMS = ({"better", "worse"}, {"tie"}, {"response", "thumb"}, {"response", "edited"})


class Answer(BaseModel):
    """One answer of the policy as it was sent; `finish_reason` is "stop" only if the policy itself ended it."""

    model_config = ConfigDict(frozen=True)

    id: str
    messages: list[dict[str, str]]  # the prompt
    text: str
    finish_reason: str
    run: str
    versions: tuple[int, ...]  # the weights that it began with, then those that were swapped in before it ended
    time: float  # when it ended, seconds since 1970


class Judgement(BaseModel):
    """Body of `POST /feedback`: the fields of one of the four FORMS, and optionally a note. Responses are ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    better: ResponseId | None = None
    worse: ResponseId | None = None
    tie: tuple[ResponseId, ResponseId] | None = None
    response: ResponseId | None = None
    thumb: Literal["up", "down"] | None = None
    edited: str | None = None
    note: Annotated[str, Field(max_length=2000)] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> "Judgement":
        if {name for name, value in self if value is not None} - {"note"} not in FORMS:
            raise ValueError("give better and worse, or tie, or response with thumb, or response with edited")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("names the same response twice; name two different responses")
        if self.edited is not None and not self.edited.strip():
            raise ValueError("edited is empty; write the answer as it should be")
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the responses; the better one first."""
        return self.tie or tuple(key for key in (self.better, self.worse, self.response) if key is not None)

    @property
    def kind(self) -> Kind:
        return self.thumb or ("edited" if self.edited else "tie" if self.tie else "better")

    @property
    def vote_id(self) -> str:
        """Equal for equal judgements of the same responses; the note does not count."""
        return _digest([self.kind, *(sorted(self.ids) if self.tie else self.ids), self.edited])


class Vote(BaseModel):
    """A judgement together with its answers."""

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    answers: tuple[Answer, ...]  # the better one first
    edited: str | None = None
    note: str | None = None
    time: float  # when it was received, seconds since 1970


def make_vote(judgement: Judgement, answers: Sequence[Answer], time: float) -> Vote:
    """The vote for a judgement and the answers named by its `ids`. FeedbackError if they do not fit together."""
    if any(answer.messages != answers[0].messages for answer in answers):
        raise FeedbackError(f"{'tie' if judgement.tie else 'worse'}: the responses answer different prompts")
    if judgement.edited == answers[0].text:
        raise FeedbackError("edited: equals the original answer; send thumb 'up' if the answer is good")
    kind, edited, note = judgement.kind, judgement.edited, judgement.note
    return Vote(id=judgement.vote_id, kind=kind, answers=tuple(answers), edited=edited, note=note, time=time)


def votes_journal(run: Place) -> "Journal":
    return Journal(run.at("feedback", "votes"), VOTES_SPAN_S)


def read_votes(run: Place) -> list[Vote]:
    """All votes stored in a run directory."""
    journal = votes_journal(run)
    journal.refresh()
    return [Vote.model_validate_json(record) for record in journal.records()]


class FeedbackRow(TypedDict):
    """A preference pair in the conversational layout of `data.train`.

    `feedback` has the number of votes `for` and `against` it, the ids of these `votes` and their `answers`, the `runs`
    and `versions` of the answers, and the `times` of the first and the last vote.
    """

    id: str
    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    feedback: dict[str, int | list[str] | list[int] | list[float]]


class _Opinion(NamedTuple):
    """That one text is better than another: a comparison, an edit, or the thumbs on two answers."""

    chosen: str
    rejected: str
    votes: tuple[Vote, ...]


class _NoPair(Exception):
    """Votes on two texts that make no pair; the message is the reason they are counted under."""


def pairs_from(votes: Iterable[Vote]) -> tuple[list[FeedbackRow], Counter[str]]:
    """Votes -> preference rows, and the number of unused votes by reason. The order of the votes does not matter.

    * Answers to the same prompt with the same text are the same answer.
    * A comparison prefers the better answer, an edit the edited answer to the original. The thumbs on an answer count
      as their majority; the first liked answer of a prompt is paired with its first disliked one, and so on, by time.
    * All opinions on the same two texts give one row, by majority, or none if they are balanced.
    * An answer that the policy did not end itself (`max_tokens`, a stop string) is never chosen, unless one of these
      votes has the same text as an edit.

    A vote is used in at most one row. Unused votes may make a row together with later ones. A row's `id` depends on
    prompt and texts alone.
    """
    by_prompt: dict[str, dict[str, Vote]] = {}
    for vote in votes:
        by_prompt.setdefault(_json(vote.answers[0].messages), {})[vote.id] = vote
    rows: list[FeedbackRow] = []
    unused: Counter[str] = Counter()
    for prompt in sorted(by_prompt):
        ordered = _by_time(by_prompt[prompt].values())
        by_texts: dict[tuple[str, ...], list[_Opinion]] = {}
        for opinion in [*_comparisons(ordered, unused), *_matched_thumbs(ordered, unused)]:
            by_texts.setdefault(tuple(sorted((opinion.chosen, opinion.rejected))), []).append(opinion)
        for _, opinions in sorted(by_texts.items()):
            try:
                rows.append(_majority_row(json.loads(prompt), opinions))
            except _NoPair as reason:
                unused[str(reason)] += sum(len(opinion.votes) for opinion in opinions)
    return rows, unused


def as_jsonl(rows: Iterable[FeedbackRow]) -> bytes:
    """Rows as the content of a file that `data.train` can name."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _by_time(votes: Iterable[Vote]) -> list[Vote]:
    return sorted(votes, key=lambda vote: (vote.time, vote.id))


def _comparisons(votes: Sequence[Vote], unused: Counter[str]) -> Iterable[_Opinion]:
    for vote in votes:
        if vote.kind == "tie":
            unused["tie"] += 1
        elif vote.kind == "better":
            yield _Opinion(vote.answers[0].text, vote.answers[1].text, (vote,))
        elif vote.kind == "edited":
            yield _Opinion(vote.edited or "", vote.answers[0].text, (vote,))


def _matched_thumbs(votes: Sequence[Vote], unused: Counter[str]) -> Iterable[_Opinion]:
    by_text: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.kind in ("up", "down"):
            by_text.setdefault(vote.answers[0].text, []).append(vote)
    liked, disliked = list[str](), list[str]()
    for text, thumbs in by_text.items():  # in the order of their first vote
        balance = sum(1 if vote.kind == "up" else -1 for vote in thumbs)
        if balance > 0 and not _ended(text, thumbs):
            unused["a cut answer is never chosen"] += len(thumbs)
        elif balance:
            (liked if balance > 0 else disliked).append(text)
        else:
            unused["thumbs up and down for the same answer"] += len(thumbs)
    for up, down in zip(liked, disliked, strict=False):
        yield _Opinion(up, down, (*by_text[up], *by_text[down]))
    matched = min(len(liked), len(disliked))
    for text in (*liked[matched:], *disliked[matched:]):
        unused["a thumb without its counterpart"] += len(by_text[text])


def _majority_row(prompt: list[dict[str, str]], opinions: Sequence[_Opinion]) -> FeedbackRow:
    """The row that most opinions on the same two texts agree with. Raises _NoPair."""
    chosen, rejected = opinions[0].chosen, opinions[0].rejected
    if chosen == rejected:
        raise _NoPair("identical answers")
    agree = sum(opinion.chosen == chosen for opinion in opinions)
    against = len(opinions) - agree
    if agree == against:
        raise _NoPair("votes that contradict each other")
    if agree < against:
        chosen, rejected, agree, against = rejected, chosen, against, agree
    votes = _by_time({vote.id: vote for opinion in opinions for vote in opinion.votes}.values())
    if not chosen.strip() or not rejected.strip():
        raise _NoPair("an empty answer")
    if not _ended(chosen, votes):
        raise _NoPair("a cut answer is never chosen")
    answers = {answer.id: answer for vote in votes for answer in vote.answers}
    return {
        "id": f"feedback-{_digest([prompt, chosen, rejected])}",
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "feedback": {
            "for": agree,
            "against": against,
            "votes": [vote.id for vote in votes],
            "answers": sorted(answers),
            "runs": sorted({answer.run for answer in answers.values()}),
            "versions": sorted({version for answer in answers.values() for version in answer.versions}),
            "times": [votes[0].time, votes[-1].time],
        },
    }


def _ended(text: str, votes: Iterable[Vote]) -> bool:
    """Whether the policy ended an answer with this text itself, or a user wrote it as an edit."""
    ended = ((vote.edited, {a.text for a in vote.answers if a.finish_reason == "stop"}) for vote in votes)
    return any(text == edited or text in answers for edited, answers in ended)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(value: object) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[:32]


class _Entry(NamedTuple):
    """What the index knows of a record: its time, and that it is bytes `start` to `end` of a segment."""

    segment: str
    start: int
    end: int
    time: float


class Journal:
    """JSON objects with a unique `id` and a `time` (seconds since 1970), in segments `<first time>-<random>.jsonl`.

    A segment appears as a whole and never changes. Segments of the same span of `span_s` seconds are merged into ones
    of at most `most` records and `most_bytes`, since only whole segments are dropped. A merged segment is written
    before its parts are removed: a reader may find a record twice, which counts once, but never misses one. Several
    processes may write. Only an index is in memory. Methods may block, and must be called by one thread at a time.
    """

    def __init__(self, folder: Place, span_s: float, most: int = 4096, most_bytes: int = 16 << 20) -> None:
        self._folder, self._span_ms = folder, max(1, int(1000 * span_s))
        self._most, self._most_bytes = most, most_bytes
        self._segments: dict[str, int] = {}  # bytes by name
        self._index: dict[str, _Entry] = {}

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return sum(self._segments.values())

    def refresh(self) -> None:
        """Reads what other processes have written, merged or dropped since the last time."""
        for _ in range(ATTEMPTS):
            names = [name for name in self._folder.names() if _SEGMENT.fullmatch(name)]
            self._forget(self._segments.keys() - names)
            with suppress(FileNotFoundError):  # merged or dropped since it was listed
                for name in names:
                    if name not in self._segments:
                        self._add_segment(name, self._folder.at(name).read())
                return
        raise OSError(f"{self._folder.url}: its files change faster than they can be read; try again")

    def append(self, records: Sequence[bytes]) -> None:
        """Stores records (one line of JSON each) as one segment, durably; those with a known id are left out."""
        new = {key: line for line in records if (key := json.loads(line)["id"]) not in self._index}
        if new:
            self._write(list(new.values()))

    def get(self, record_id: str) -> bytes | None:
        """The JSON of a record in the index; None if it is unknown, or was dropped."""
        for _ in range(ATTEMPTS):
            entry = self._index.get(record_id)
            if entry is None:
                return None
            try:
                return self._folder.at(entry.segment).read(entry.start, entry.end)
            except FileNotFoundError:  # another process has merged its segment
                self.refresh()
        return None

    def records(self) -> list[bytes]:
        """The JSON of all records in the index, oldest first."""
        for _ in range(ATTEMPTS):
            try:
                found = self._read(list(self._segments))
            except FileNotFoundError:
                self.refresh()
            else:
                return [found[key] for key in sorted(found, key=lambda key: (self._index[key].time, key))]
        raise OSError(f"{self._folder.url}: its files change faster than they can be read; try again")

    def drop(self, before: float, most: int, most_bytes: int) -> None:
        """Removes segments whose records are all older than `before`, then the oldest segments until at most `most`
        records and `most_bytes` are left.
        """
        newest: dict[str, float] = dict.fromkeys(self._segments, 0.0)
        counts = Counter(entry.segment for entry in self._index.values())
        for entry in self._index.values():
            newest[entry.segment] = max(newest[entry.segment], entry.time)
        records, nbytes = len(self), self.nbytes
        for name in sorted(newest, key=lambda each: (newest[each], each)):
            if newest[name] >= before and records <= most and nbytes <= most_bytes:
                return
            records, nbytes = records - counts[name], nbytes - self._segments[name]
            self._remove([name])

    def merge(self, now: float) -> None:
        """Merges the segments of each time span that is over or has MERGE_AT segments."""
        for over, names in self._groups(now):
            if len(names) < (2 if over else MERGE_AT):
                continue
            try:
                lines = self._read(names)
            except FileNotFoundError:  # another process is merging them
                self.refresh()
                return
            if lines:
                self._write(list(lines.values()))
            self._remove(names)

    def _groups(self, now: float) -> list[tuple[bool, list[str]]]:
        """Segments that may be merged into one, and whether their time span is over."""
        counts = Counter(entry.segment for entry in self._index.values())
        groups: list[tuple[bool, list[str]]] = []
        last, records, nbytes = -1, 0, 0
        for name in sorted(self._segments):
            span, more, more_bytes = int(name.split("-")[0]) // self._span_ms, counts[name], self._segments[name]
            records, nbytes = records + more, nbytes + more_bytes
            if span != last or records > self._most or nbytes > self._most_bytes:
                groups.append((span < int(1000 * now) // self._span_ms, []))
                last, records, nbytes = span, more, more_bytes
            groups[-1][1].append(name)
        return groups

    def _read(self, names: Sequence[str]) -> dict[str, bytes]:
        """The records of these segments that are in the index, by id."""
        contents = {name: self._folder.at(name).read() for name in names}
        entries = {key: entry for key, entry in self._index.items() if entry.segment in contents}
        return {key: contents[entry.segment][entry.start : entry.end] for key, entry in entries.items()}

    def _write(self, lines: Sequence[bytes]) -> None:
        first = min(json.loads(line)["time"] for line in lines)
        name, content = f"{int(1000 * first):014d}-{uuid.uuid4().hex}.jsonl", b"".join(line + b"\n" for line in lines)
        self._folder.at(name).write(content)
        for line in lines:
            self._index.pop(json.loads(line)["id"], None)
        self._add_segment(name, content)

    def _add_segment(self, name: str, content: bytes) -> None:
        self._segments[name] = len(content)
        start = 0
        for line in content.splitlines(keepends=True):
            end = start + len(line.rstrip(b"\n"))
            if (record := as_object(line)) is not None and {"id", "time"} <= record.keys():
                self._index.setdefault(record["id"], _Entry(name, start, end, record["time"]))
            else:  # on some file systems a segment that was cut short appears
                logger.warning("%s/%s: a record was cut short, and is left out", self._folder.url, name)
            start += len(line)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._folder.at(name).remove()
        self._forget(set(names))

    def _forget(self, names: set[str]) -> None:
        for name in names:
            del self._segments[name]
        if names:
            self._index = {key: entry for key, entry in self._index.items() if entry.segment not in names}
