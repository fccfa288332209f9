"""What users said of answers, and how that becomes preference pairs.

A vote carries the answers that it is about, so it keeps its meaning when they are kept no longer. In a run directory:

    feedback/answers/     answers of the last `serve.feedback.keep_hours` (a journal)
    feedback/votes/       votes, for good (a journal)
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sampo_ray.errors import FeedbackError
from sampo_ray.run.journal import Journal
from sampo_ray.run.storage import Place

VOTES_TOGETHER_S = 24 * 3600.0
"""Votes of one day end up in one file."""

ResponseId = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Kind = Literal["better", "tie", "up", "down", "edited"]
FORMS = ({"better", "worse"}, {"tie"}, {"response", "thumb"}, {"response", "edited"})


class Answer(BaseModel):
    """One answer of the policy as it was given; `finish_reason` "stop" means that the policy itself ended it."""

    model_config = ConfigDict(frozen=True)

    id: str
    messages: list[dict[str, str]]
    """The prompt."""
    text: str
    finish_reason: str
    run: str
    versions: tuple[int, ...]
    """The weights it began with, and those that came in on the way."""
    time: float
    """When it ended, seconds since 1970."""


class Judgement(BaseModel):
    """Body of `POST /feedback`: one of the four FORMS, maybe with a note. Responses are named by their ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    better: ResponseId | None = None
    worse: ResponseId | None = None
    tie: tuple[ResponseId, ResponseId] | None = None
    response: ResponseId | None = None
    thumb: Literal["up", "down"] | None = None
    edited: str | None = None
    note: Annotated[str, Field(max_length=2000)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Judgement":
        if {name for name, value in self if value is not None} - {"note"} not in FORMS:
            raise ValueError("give better and worse, or tie, or response with thumb, or response with edited")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("names the same response twice; a comparison needs two")
        if self.edited is not None and not self.edited.strip():
            raise ValueError("edited is empty; write the answer as it should be")
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """The responses judged; the better one first."""
        return self.tie or tuple(each for each in (self.better, self.worse, self.response) if each is not None)

    @property
    def kind(self) -> Kind:
        if self.thumb or self.edited:
            return self.thumb or "edited"
        return "tie" if self.tie else "better"

    @property
    def vote_id(self) -> str:
        """The same for the same judgement of the same responses, whatever the note."""
        ids = sorted(self.ids) if self.tie else self.ids
        return _digest([self.kind, *ids, self.edited])


class Vote(BaseModel):
    """A judgement with the answers that it is about."""

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    answers: tuple[Answer, ...]
    """The better one first."""
    edited: str | None = None
    note: str | None = None
    time: float
    """When it came in, seconds since 1970."""


def vote_of(said: Judgement, answers: Sequence[Answer], time: float) -> Vote:
    """The vote, given the answers named by `said.ids`. FeedbackError when it makes no sense for these."""
    if any(answer.messages != answers[0].messages for answer in answers):
        raise FeedbackError(f"{'tie' if said.tie else 'worse'}: the responses answer different prompts")
    if said.edited == answers[0].text:
        raise FeedbackError("edited: is the answer as it was; use a thumb to say that it is good")
    return Vote(id=said.vote_id, kind=said.kind, answers=tuple(answers), edited=said.edited, note=said.note, time=time)


def votes_journal(run: Place) -> Journal:
    return Journal(run.at("feedback", "votes"), VOTES_TOGETHER_S)


def read_votes(run: Place) -> list[Vote]:
    """All votes stored in a run directory."""
    journal = votes_journal(run)
    journal.refresh()
    return [Vote.model_validate(record) for record in journal.records()]


@dataclass(frozen=True)
class _Ballot:
    """One opinion on two texts; a vote, or two thumbs (with all their company) that make one."""

    chosen: str
    rejected: str
    votes: tuple[Vote, ...]


def pairs_from(votes: Iterable[Vote]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Votes -> preference rows, and how many votes made none, by reason. Their order does not matter.

    * Answers to the same prompt with the same text are the same answer.
    * A comparison is for (better, worse), an edited answer for (edited, original). Of thumbs each answer has the
      majority; then, in the order of time, the first liked one is paired with the first disliked one of the same
      prompt, and so on, each of them once.
    * All that is said of the same two texts is settled together, by majority; where it is even there is no pair.
    * An answer that the policy did not end itself (`max_tokens`, a stop string) is never chosen, unless one of these
      votes has the same text as an edit.

    A vote is in one row at most; those in none may still make one together with later votes. Rows are as `data.train`
    has them, in conversational form; `id` depends on prompt and texts alone, and `feedback` says where a row is from:
    votes for and against it and their ids, ids of the answers, runs, versions, and times of the first and last vote.
    """
    by_prompt: dict[str, dict[str, Vote]] = {}
    for vote in votes:
        by_prompt.setdefault(_json(vote.answers[0].messages), {})[vote.id] = vote
    rows: list[dict[str, Any]] = []
    left: Counter[str] = Counter()
    for prompt in sorted(by_prompt):
        mine = sorted(by_prompt[prompt].values(), key=lambda vote: (vote.time, vote.id))
        by_texts: dict[tuple[str, ...], list[_Ballot]] = {}
        for ballot in [*_comparisons(mine, left), *_matched_thumbs(mine, left)]:
            by_texts.setdefault(tuple(sorted((ballot.chosen, ballot.rejected))), []).append(ballot)
        for texts in sorted(by_texts):
            row = _settled(json.loads(prompt), by_texts[texts])
            if isinstance(row, str):
                left[row] += sum(len(ballot.votes) for ballot in by_texts[texts])
            else:
                rows.append(row)
    return rows, left


def as_jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as a file that `data.train` reads."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _comparisons(votes: Sequence[Vote], left: Counter[str]) -> Iterable[_Ballot]:
    for vote in votes:
        if vote.kind == "tie":
            left["tie"] += 1
        elif vote.kind == "better":
            yield _Ballot(vote.answers[0].text, vote.answers[1].text, (vote,))
        elif vote.kind == "edited":
            yield _Ballot(vote.edited or "", vote.answers[0].text, (vote,))


def _matched_thumbs(votes: Sequence[Vote], left: Counter[str]) -> Iterable[_Ballot]:
    by_text: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.kind in ("up", "down"):
            by_text.setdefault(vote.answers[0].text, []).append(vote)
    liked: list[str] = []
    disliked: list[str] = []
    for text, thumbs in by_text.items():  # in the order of their first vote
        balance = sum(1 if vote.kind == "up" else -1 for vote in thumbs)
        if balance > 0 and not _ended(text, thumbs):
            left["a cut answer is never chosen"] += len(thumbs)
        elif balance:
            (liked if balance > 0 else disliked).append(text)
        else:
            left["thumbs up and down for the same answer"] += len(thumbs)
    for up, down in zip(liked, disliked, strict=False):
        yield _Ballot(up, down, (*by_text[up], *by_text[down]))
    matched = min(len(liked), len(disliked))
    for text in (*liked[matched:], *disliked[matched:]):
        left["a thumb without its counterpart"] += len(by_text[text])


def _settled(prompt: list[dict[str, str]], ballots: Sequence[_Ballot]) -> dict[str, Any] | str:
    """The row that the majority of the ballots on two texts wants, or the reason why there is none."""
    chosen, rejected = ballots[0].chosen, ballots[0].rejected
    if chosen == rejected:
        return "identical answers"
    favour = [ballot.chosen == chosen for ballot in ballots]
    if 2 * sum(favour) == len(favour):
        return "votes that contradict each other"
    if 2 * sum(favour) < len(favour):
        chosen, rejected, favour = rejected, chosen, [not each for each in favour]
    votes = sorted(
        {v.id: v for ballot in ballots for v in ballot.votes}.values(), key=lambda vote: (vote.time, vote.id)
    )
    if not chosen.strip() or not rejected.strip():
        return "an empty answer"
    if not _ended(chosen, votes):
        return "a cut answer is never chosen"
    answers = {answer.id: answer for vote in votes for answer in vote.answers}
    return {
        "id": f"feedback-{_digest([prompt, chosen, rejected])}",
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "feedback": {
            "for": sum(favour),
            "against": len(favour) - sum(favour),
            "votes": [vote.id for vote in votes],
            "answers": sorted(answers),
            "runs": sorted({answer.run for answer in answers.values()}),
            "versions": sorted({version for answer in answers.values() for version in answer.versions}),
            "times": [votes[0].time, votes[-1].time],
        },
    }


def _ended(text: str, votes: Iterable[Vote]) -> bool:
    """Whether the text is whole: an answer that ended by itself, or somebody's own words."""
    return any(
        vote.edited == text or any(a.text == text and a.finish_reason == "stop" for a in vote.answers) for vote in votes
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[:32]
