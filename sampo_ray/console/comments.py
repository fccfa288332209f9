"""What `--dry-run` prints in front of the configuration: comment lines of YAML, to be read on a terminal."""

import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sampo_ray.config.placement import Plan
from sampo_ray.data.first_row import FirstRow, Part

WIDTH = 96
"""Cells of a line, at most."""
BEGINNING, END = (500, 8), (250, 4)
"""Characters and lines that are shown of a longer text."""

_JOINERS = "\u200c\u200d"  # which some scripts and emoji are written with
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def comment(text: str) -> str:
    """Each line of `text` as a comment of YAML, whatever it quotes. What a line has too much goes on indented."""
    lines = [line for each in map(_printable, text.split("\n")) for line in _wrapped("", each, "  ")]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def plan_lines(plan: Plan) -> list[str]:
    """Where the run's actors go, as lines of a table for terminals of 80 columns."""
    return ["", "where actors go (GPUs, CPUs and memory of one):", *plan.table().split("\n"), ""]


def first_row(first: FirstRow) -> str:
    """A row as it was understood: the turns and answers with their tokens, and what of them is cut."""
    lines = ["", f"first row ({first.where}) as it is read, with tokens:"]
    for part in first.parts:
        lines += _part(part)
    lines += _wrapped("  ", first.size, "  ")
    return "\n".join([*lines, ""])


def _part(part: Part) -> Iterator[str]:
    head = f"  {part.role:<9}{part.tokens:>6,}  "
    *ended, last = _shortened(part.text).split("\n")
    last += f" [{part.cut}]" if part.cut else ""
    for line in [*(f"{each}↵" for each in ended), last]:
        yield from _wrapped(head, _printable(line), " " * len(head))
        head = " " * len(head)


def _wrapped(head: str, text: str, further: str) -> Iterator[str]:
    """`text` behind `head`, on as many lines as it takes; `further` is in front of those after the first."""
    width = WIDTH - len("# ") - cell_len(head)
    if cell_len(text) > width:
        first, *others = Text(text).wrap(Console(width=WIDTH), width - max(0, len(further) - cell_len(head)))
        yield head + first.plain
        yield from (further + line.plain for line in others)
    else:
        yield head + text


def _shortened(text: str) -> str:
    beginning = "\n".join(text[: BEGINNING[0]].split("\n")[: BEGINNING[1]])
    end = "\n".join(text[-END[0] :].split("\n")[-END[1] :])
    left = len(text) - len(beginning) - len(end)
    return text if left < 50 else f"{beginning} [... {left:,} characters ...] {end}"


def _printable(line: str) -> str:
    """Characters that a terminal would not show, or would obey, written as Python does."""
    return "".join(each if _shows(each) else each.encode("unicode_escape").decode() for each in line)


def _shows(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _HIDDEN
