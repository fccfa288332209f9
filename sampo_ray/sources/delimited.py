"""CSV and TSV files: text stays text, a cell for each column."""

import csv
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from sampo_ray.errors import DataError

_MARK = re.compile(r'"?sep=(.)"?\r?\n?')  # a first line that Excel writes and reads
_UNNAMED = "Unnamed: 0"
_RETURN = re.compile(r"\r(?=[^\n])")  # many writers do not quote a cell that has one, and csv would end the row there
_STAND_IN = "\udc0d"  # in no decoded text


def delimited_rows(file: io.TextIOWrapper, path: str, delimiter: str | None) -> Iterator[tuple[int, dict[str, object]]]:
    """The rows of a file with a line of column names, with the lines they begin at.

    `delimiter`: what stands between cells; None: a comma, or the semicolon or tab that the line of names has. Raises
    DataError for names that are missing or there twice, rows with too few or too many cells, and quotes that do not
    end.
    """
    csv.field_size_limit(sys.maxsize)
    first = file.readline()
    if marked := _MARK.fullmatch(first):
        delimiter, first = marked[1], file.readline()
    skipped = 1 if marked else 0
    delimiter = delimiter or _delimiter(first, path)
    spaced = bool(re.search(rf'{re.escape(delimiter)} +"?\w', first)) and delimiter != "\t"
    reader = csv.reader(_again(first, file), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    line = skipped + 1
    try:
        names = _names(next(reader, []), path)
        line = skipped + reader.line_num + 1
        for cells in reader:
            if cells:  # else an empty line
                yield line, _row(names, cells, f"{path}:{line}")
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not valid {'TSV' if delimiter == chr(9) else 'CSV'} ({error}); quote cells that have "
            'quotes or newlines in them, and write each of their quotes twice ("")'
        ) from None


def _again(first: str, file: io.TextIOWrapper) -> Iterator[str]:
    for line in itertools.chain([first], file):
        yield _RETURN.sub(_STAND_IN, line) if "\r" in line else line


def _delimiter(first: str, path: str) -> str:
    """What separates the names in the first line: where only one of these gives several, that one; else a comma."""
    found = [each for each in (",", ";", "\t") if len(next(csv.reader([first], delimiter=each), [])) > 1]
    if len(found) > 1:
        raise DataError(
            f"data source {path!r}: both {found[0]!r} and {found[1]!r} are in its line of column names; write names "
            "without, or write a .jsonl"
        )
    return found[0] if found else ","


def _names(cells: Sequence[str], path: str) -> list[str]:
    """The names of columns. The first may be missing, as it is for the index that pandas writes."""
    names = [name.strip() for name in cells]
    if names and not names[0] and len(names) > 1:
        names[0] = _UNNAMED
    repeated = [name for name, times in Counter(name for name in names if name).items() if times > 1]
    if repeated:
        raise DataError(f"{path}:1: the column {repeated[0]!r} is there twice; give each column a name of its own")
    if not any(names):
        raise DataError(f"{path}:1: has no column names; write them in the first line")
    return names


def _row(names: Sequence[str], cells: Sequence[str], where: str) -> dict[str, object]:
    if len(cells) != len(names):
        raise DataError(
            f"{where}: has {len(cells)} cells for {len(names)} columns; quote cells that have delimiters, quotes or "
            "newlines in them"
        )
    for at, (name, cell) in enumerate(zip(names, cells, strict=True), start=1):
        if not name and cell:
            raise DataError(f"{where}: column {at} has text and no name; name it in the first line")
    return {name: cell.replace(_STAND_IN, "\r") for name, cell in zip(names, cells, strict=True) if name}
