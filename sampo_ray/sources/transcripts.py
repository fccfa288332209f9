"""Conversations written as one text with a name in front of each turn: `Human: ... Assistant: ...` and its kin.

A text is a transcript only if it begins with the name of a speaker (behind a known preface, if any) and splits into
turns of a known style. Text that mentions such names further down stays text. What begins as an unmistakable transcript
and does not split is refused.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sampo_ray.sources.unusable import TRANSCRIPT, Unusable


class Piece(NamedTuple):
    """A turn within a text. `closed`: it does not end just because the text does."""

    role: str
    text: str
    closed: bool = True


_ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot", "response"), "assistant"),
    **{name: name for name in ("system", "input")},
}


@dataclass(frozen=True)
class _Style:
    """How turns are told apart. `begins` matches what is in front of the first of them and may have a group `system`;
    `mark` matches a speaker's name (group 1) with the white space around it.
    """

    begins: re.Pattern[str]
    mark: re.Pattern[str]
    sure: bool = True  # no ordinary text begins so: what does not split is refused
    alternate: bool = True  # user and assistant take turns
    alone: bool = False  # a single turn will do

    def split(self, text: str, more: str) -> list[Piece] | None:
        """The turns of `text` with `more` behind it; None for a text that is no such transcript. Raises Unusable."""
        if not (begun := self.begins.match(text)):
            return None
        whole = text + more
        marks = [*self.mark.finditer(text, begun.end()), *self.mark.finditer(whole, len(text))]
        pieces = _joined(_pieces(whole, marks))
        if self._fits([piece.role for piece in pieces]):
            preface = (begun.groupdict().get("system") or "").strip()
            return [Piece("system", preface), *pieces] if preface else pieces
        if self.sure:
            raise Unusable(TRANSCRIPT)
        return None

    def _fits(self, roles: Sequence[str]) -> bool:
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        twice = self.alternate and any(a == b for a, b in itertools.pairwise(spoken))
        return (set(spoken) == {"user", "assistant"} and not twice) or (self.alone and len(spoken) == 1)


_PEOPLE = r"(Human|Assistant|AI|System)"
_END = r"(?=\s|\Z)"  # behind a name's colon
_ALPACA = (
    r"Below is an instruction that describes a task(?:, paired with an input that provides further context)?\. "
    r"Write a response that appropriately completes the request\.\s+"
)

_STYLES = (
    # HH-RLHF, Nectar: blank lines, and a speaker may go on in a second turn
    _Style(
        re.compile(r"(?=\s*(?:System:.*?\n\n)?(?:Human|Assistant):.*\n\n(?:Human|Assistant|AI):)", re.DOTALL),
        re.compile(rf"(?:\A\s*|\n\n){_PEOPLE}:"),
        alternate=False,
    ),
    # prompts for completion: a preface, and an open turn of the assistant at the end
    _Style(
        re.compile(r"(?P<system>\S.*?)(?=\n\nHuman:.*\n\nAssistant:\s*\Z)", re.DOTALL),
        re.compile(rf"\n\n{_PEOPLE}:"),
        sure=False,
        alternate=False,
    ),
    # one line a turn, or all in one
    _Style(
        re.compile(r"(?=\s*Human:.*\n(?:Assistant|AI):)", re.DOTALL), re.compile(rf"(?:\A\s*|\n\s*){_PEOPLE}:{_END}")
    ),
    _Style(re.compile(r"(?=\s*(?:Human|Assistant):)"), re.compile(rf"(?:\A\s*|\s+)(Human|Assistant):{_END}")),
    _Style(
        re.compile(r"(?=\s*User:.*\n\s*(?:Assistant|AI|Bot):)", re.DOTALL),
        re.compile(rf"(?:\A\s*|\n\s*)(User|Assistant|AI|Bot):{_END}"),
        sure=False,
    ),
    # OpenAssistant: no other text begins so
    _Style(re.compile(r"(?=\s*prompter:\s)"), re.compile(rf"(?:\A\s*|\n\s*)(prompter|assistant):{_END}"), alone=True),
    # OpenAssistant-Guanaco, Alpaca, StableBeluga: headings
    _Style(
        re.compile(rf"\s*(?:{_ALPACA})?(?=###\s?(?:System|Human|User|Instruction):)"),
        re.compile(r"\s*###\s?(System|Human|User|Assistant|Instruction|Input|Response):"),
    ),
    # Vicuna
    _Style(
        re.compile(r"\s*(?P<system>A chat between .*?(?=\sUSER:))?(?=\s*USER:.*\bASSISTANT:)", re.DOTALL),
        re.compile(rf"(?:\A\s*|\s+|</s>)(USER|ASSISTANT):{_END}"),
        sure=False,
    ),
    # OpenChatKit
    _Style(re.compile(r"(?=\s*<human>:)"), re.compile(r"(?:\A\s*|\s*)<(human|bot)>:")),
)
_MAYBE = re.compile(
    r"\s*(?:Human:|Assistant:|System:|User:|USER:|prompter:|A chat between |<human>:|###|Below is an instruction)"
)
_ALONE = re.compile(r"\n\n(?:Human:|(Assistant:))(.*)", re.DOTALL)


def transcript(text: str, more: str = "") -> list[Piece] | None:
    """The turns of `text` with `more` behind it; None if `text` is no transcript. An empty turn in front of another one
    of the same speaker is left out. Raises Unusable for what begins as a transcript and does not split.
    """
    if not _MAYBE.match(text) and not text.rstrip().endswith("\n\nAssistant:"):
        return None
    if (alone := _ALONE.fullmatch(text + more)) and not re.search(r"\n\s*(?:Human|Assistant|AI):", alone.group(2)):
        return [Piece("assistant" if alone.group(1) else "user", alone.group(2).strip())]
    return next((pieces for style in _STYLES if (pieces := style.split(text, more)) is not None), None)


def names_speakers(text: str) -> bool:
    """Whether names of speakers begin paragraphs of a text, as in a transcript."""
    return bool(re.search(r"\n\n(?:Human|Assistant):", text))


def _pieces(text: str, marks: Sequence[re.Match[str]]) -> list[Piece]:
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        Piece(_ROLES[mark.group(1).lower()], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Without empty turns in front of another one of the same role, and inputs behind their instructions."""
    kept = list[Piece]()
    for piece in pieces:
        last = kept[-1] if kept else None
        if piece.role == "input":
            if last is None or last.role != "user":
                raise Unusable(TRANSCRIPT)
            kept[-1] = Piece("user", "\n".join(each for each in (last.text, piece.text) if each))
        elif last is not None and last.role == piece.role and not last.text:
            kept[-1] = piece
        else:
            kept.append(piece)
    return kept
