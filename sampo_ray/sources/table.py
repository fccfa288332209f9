"""A source's first rows: which columns there are, and what they hold."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sampo_ray.sources.conversations import filled, holds
from sampo_ray.sources.layouts import INSIDE
from sampo_ray.sources.messages import Message, Role, turns_of
from sampo_ray.sources.paths import at
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import key_of

Values = Mapping[str, object]


class Table:
    """Rows by the names of their columns, as `key_of` writes them; `under`: only of the object in that column."""

    def __init__(self, rows: Sequence[Values], under: str = "") -> None:
        self.rows = rows
        self.under = f"{under}." if under else ""
        held = [at(row, under) for row in rows] if under else rows
        names = dict.fromkeys(name for each in held if isinstance(each, Mapping) for name in each)
        self.names: dict[str, str] = {}
        for name in sorted(names, key=lambda name: key_of(str(name)) != name):  # exact names win
            self.names.setdefault(key_of(str(name)), f"{self.under}{name}")
        self._values: dict[str, list[object]] = {}

    def values(self, path: str) -> list[object]:
        """What the rows have at a path, without those that have nothing."""
        if path not in self._values:
            self._values[path] = [value for row in self.rows if holds(value := at(row, path))]
        return self._values[path]

    def find(self, keys: Iterable[str]) -> Iterator[str]:
        """The columns with one of these names that have something in some row, in the order of the names."""
        return (self.names[key] for key in keys if key in self.names and self.values(self.names[key]))

    def first(self, keys: Iterable[str], but: Sequence[str | None] = ()) -> str | None:
        """The first column with one of these names, full or empty; a full one wins."""
        there = [self.names[key] for key in keys if key in self.names and self.names[key] not in but]
        return next((path for path in there if self.values(path)), there[0] if there else None)

    def text_path(self, path: str, first: tuple[str, ...] = ()) -> str | None:
        """Where a column has its text or turns: the column, or a path into the objects that it holds. None for a
        column of numbers and the like."""
        values = self.values(path)
        if values and all(isinstance(value, Mapping) and not is_message(value) for value in values):
            inner = Table(self.rows, path)
            return next((found for each in inner.find((*first, *INSIDE)) if (found := self.text_path(each))), None)
        return path if any(isinstance(value, str | list | Mapping) for value in values) else None

    def objects(self) -> list[str]:
        """The columns that hold objects with columns of their own."""
        return [
            path
            for path in self.names.values()
            if (values := self.values(path)) and all(isinstance(value, Mapping) for value in values)
        ]


def is_message(value: Mapping[str, object]) -> bool:
    return bool({"role", "from", "speaker", "author", "sender"} & {str(name).lower() for name in value})


def is_list_of_messages(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(each, Mapping) and is_message(each) for each in value)


def turns_or_none(value: object, role: Role = "assistant") -> list[Message]:
    """The turns of a value; [] where it has none that can be read."""
    try:
        return turns_of(value, role) if filled(value) else []
    except Unusable:
        return []


def is_conversation(value: object) -> bool:
    """Whether a value, as an answer, holds a user's turn, too."""
    return any(message["role"] == "user" for message in turns_or_none(value))


def text_of(value: object) -> str:
    """What an answer says at its end, to compare it with others."""
    turns = turns_or_none(value)
    if not turns:
        return json.dumps(value, sort_keys=True, default=str)
    last = {name: part for name, part in turns[-1].items() if name != "role"}
    return str(last["content"]).strip() if len(last) == 1 else json.dumps(last, sort_keys=True, default=str)
