"""What a row says in columns that are not read: none of it may be lost without a word."""

import re
from collections.abc import Iterator, Mapping, Sequence

from sampo_ray.config.columns import Columns
from sampo_ray.sources import layouts
from sampo_ray.sources.answers import paths_of
from sampo_ray.sources.conversations import holds
from sampo_ray.sources.messages import Message
from sampo_ray.sources.paths import at
from sampo_ray.sources.table import turns_or_none
from sampo_ray.sources.unusable import IMAGES, PREFIX, REASONING, Unusable
from sampo_ray.sources.verdicts import key_of

_SPACES = re.compile(r"\s+")
_FIELDS = ("prompt", "input", "system", "history", "tools", "chosen", "rejected", "answers", "verdict", "score", "rank")
_OF_ANSWERS = {**dict.fromkeys(layouts.BEGINNINGS, PREFIX), **dict.fromkeys(layouts.THOUGHTS, REASONING)}
_OF_PROMPTS = {
    *layouts.PROMPTS,
    *layouts.CONVERSATIONS,
    *layouts.HISTORIES,
    *layouts.CONTEXTS,
    *layouts.SYSTEMS,
    *layouts.TOOLS,
    *layouts.SETTINGS,
}


def lost_column(name: str) -> str:
    """The reason for a row whose column `name` says what is not read."""
    return f"column {name} would be lost: name it in data.columns (as prompt, input, system, history, ...) or ignore it"


class Lost:
    """Knows the columns that are not read, though their names say that they change what a row means."""

    def __init__(self, columns: Columns, kind: str) -> None:
        self.used = {path for field in _FIELDS for path in paths_of(getattr(columns, field))}
        self.used |= set(columns.ignore or ())
        self.objects = {path.rpartition(".")[0] for path in self.used if "." in path}
        self.is_pair = kind == "pairs"
        self.known: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def refuse(self, values: Mapping[str, object], turns: Sequence[Message]) -> None:
        """Raises Unusable if a column that is not read says what none of `turns`, the row as it is read, says."""
        names = tuple(values)
        if names not in self.known:
            self.known[names] = list(self._watched(values))
        text = ""
        for path, reason in self.known[names]:
            value = at(values, path)
            if not holds(value) or isinstance(value, bool | int | float):
                continue
            if reason == IMAGES:
                raise Unusable(reason)
            text = text or _plain(" ".join(str(turn["content"]) for turn in turns))
            if not all(_plain(part) in text for part in _texts(value)) and not _goes_on(value, turns):
                raise Unusable(reason)

    def _watched(self, values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        """The columns to look at, each with the reason that a row is refused for."""
        inner = [(path, inside) for path in self.objects if isinstance(inside := at(values, path), Mapping)]
        for outer, columns in [("", values), *inner]:
            for name in columns:
                path = f"{outer}.{name}" if outer else str(name)
                if path in self.used or path in self.objects:
                    continue
                key = key_of(str(name))
                if key in layouts.IMAGES:
                    yield path, IMAGES
                elif key in _OF_PROMPTS:
                    yield path, lost_column(path)
                elif key in _OF_ANSWERS and self.is_pair:
                    yield path, _OF_ANSWERS[key]


def _texts(value: object) -> Iterator[str]:
    """The texts of a column: those of its turns, or all that are in it."""
    if turns := turns_or_none(value, "user"):
        yield from (str(turn["content"]) for turn in turns)
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in _texts(each))
    elif isinstance(value, str):
        yield value


def _goes_on(value: object, turns: Sequence[Message]) -> bool:
    """Whether a conversation begins with all that is asked: what it has behind that is another answer."""
    prompt = [turn for turn in turns if turn["role"] != "assistant" or turn is not turns[-1]]
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    own = turns_or_none(value, "user")
    return (
        len(own) > 1
        and len(own) > len(prompt)
        and all(
            one["role"] == other["role"] and _plain(one["content"]) == _plain(other["content"])
            for one, other in zip(prompt, own, strict=False)
        )
    )


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
