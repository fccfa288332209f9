"""JSON files: one object a line, an array of objects, or one object that holds such an array."""

import io
import json
import re
from collections.abc import Iterator

from sampo_ray.errors import DataError

CHUNK = 1 << 20
"""Characters of a JSON array that are read at once."""

_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_HOLDERS = re.compile(
    r"(data|rows|examples|instances|items|records|samples|results|entries|dataset|pairs"
    r"|(train|training|test|valid|validation|dev|eval)([_-]\w+)?)",
    re.IGNORECASE,
)
_Numbered = Iterator[tuple[int, dict[str, object]]]


def lines(file: "io.BufferedReader[io.RawIOBase]", path: str) -> _Numbered:
    """The objects of a file with one a line."""
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, error) from None
        yield number, _object(path, number, values)


def objects(file: io.TextIOWrapper, path: str, field: str | None, may_hold_rows: bool) -> _Numbered:
    """The objects of an array, or objects one after another.

    An object that is alone in its file and `may_hold_rows` stands for the array that it has under `field`, or under
    the one key that is a usual name of rows.
    """
    text = _Text(file)
    try:
        if text.mark() == "[":
            for value in _elements(text):
                yield text.number, _object(path, text.number, value)
            if text.mark():
                raise ValueError("more after the array")
            return
        if field is not None:
            yield from _held(text, path, field)
            return
        yield from _one_after_another(text, path, may_hold_rows)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, DataError) else _not_json(path, text.number, error) from None


def _one_after_another(text: "_Text", path: str, may_hold_rows: bool) -> _Numbered:
    alone: dict[str, object] | None = None
    while text.mark():
        if alone is not None:
            yield 1, alone
            alone = None
        text.number += 1
        values = _object(path, text.number, text.value())
        if text.number == 1 and may_hold_rows:
            alone = values
        else:
            yield text.number, values
    if alone is not None:
        yield from _alone(alone, path)


def _alone(values: dict[str, object], path: str) -> _Numbered:
    """What the only object of a file stands for: the rows it holds, or a row."""
    holders = [name for name, held in values.items() if _HOLDERS.fullmatch(name) and _is_rows(held)]
    if len(holders) > 1:
        raise DataError(
            f"data source {path!r}: has rows under {', '.join(holders)}; name one, as in {path}:{holders[0]}"
        )
    if _is_a_table(values):
        raise DataError(
            f"data source {path!r}: is a table column by column, not row by row; write one JSON object a line "
            "(pandas: to_json(PATH, orient='records', lines=True))"
        )
    if not holders:
        yield 1, values
        return
    rows = values.pop(holders[0])
    assert isinstance(rows, list)
    yield from enumerate(rows, start=1)


def _is_rows(held: object) -> bool:
    return isinstance(held, list) and bool(held) and all(isinstance(each, dict) for each in held)


def _is_a_table(values: dict[str, object]) -> bool:
    """Whether an object is what pandas makes of a table in another way than row by row."""
    held = list(values.values())
    if "data" in values and "columns" in values and "index" in values:
        return True
    if held and all(isinstance(each, dict) and each for each in held):
        return all(name.isdigit() for name in values) or all(
            name.isdigit() for each in held if isinstance(each, dict) for name in each
        )
    sizes = {len(each) for each in held if isinstance(each, list)}
    texts = all(isinstance(each, list) and not any(isinstance(one, dict) for one in each) for each in held)
    return len(held) > 1 and texts and len(sizes) == 1 and sizes != {0} and sizes != {1}


def _held(text: "_Text", path: str, field: str) -> _Numbered:
    """The objects of the array that an object has under `field`."""
    names: list[str] = []
    if text.mark() == "{":
        for name in _members(text):
            names.append(name)
            if name == field and text.mark() == "[":
                for value in _elements(text):
                    yield text.number, _object(path, text.number, value)
            else:
                text.value()
    if field not in names:
        raise DataError(f"data source {path!r}: has no rows under {field!r}; name one of {', '.join(names)}")


class _Text:
    """A file's text as far as it is needed: what is left of it begins at `at`, in the row with that 1-based number."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.file, self.text, self.at, self.number = file, "", 0, 0

    def more(self) -> bool:
        """Reads on, as much again as is left; False at the end."""
        left = self.text[self.at :]
        piece = self.file.read(max(CHUNK, len(left)))
        self.text, self.at = left + piece, 0
        return bool(piece)

    def mark(self) -> str:
        """Skips spaces, and returns the character after them without passing it; "" at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> object:
        """Passes the next value and returns it. ValueError if there is none."""
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and self.more()):
                    raise


def _elements(text: _Text) -> Iterator[object]:
    """The elements of the array that begins here, which is passed; one and a chunk are in memory at a time."""
    text.number, after = 0, text.mark()  # the bracket
    while after != "]":
        text.at += 1
        if text.mark() == "]" and text.number == 0:
            break
        text.number += 1
        yield text.value()
        if (after := text.mark()) not in ("]", ","):
            raise ValueError(f"{after!r} after entry {text.number}")
    text.at += 1


def _members(text: _Text) -> Iterator[str]:
    """The names of the members of the object that begins here; the caller passes their values."""
    after = text.mark()  # the brace
    while after != "}":
        text.at += 1
        if text.mark() == "}":
            break
        name = text.value()
        if not isinstance(name, str) or text.mark() != ":":
            raise ValueError(f"{name!r} is no name of a member")
        text.at += 1
        text.mark()
        yield name
        if (after := text.mark()) not in ("}", ","):
            raise ValueError(f"{after!r} after member {name!r}")
    text.at += 1


def _object(path: str, number: int, values: object) -> dict[str, object]:
    if isinstance(values, dict):
        return values
    raise DataError(
        f"{path}:{number}: holds a {type(values).__name__}; write one JSON object a line, or an array of objects"
    )


def _not_json(path: str, number: int, error: Exception) -> DataError:
    return DataError(f"{path}:{number}: not valid JSON ({error}); write one JSON object a line, or an array of objects")
