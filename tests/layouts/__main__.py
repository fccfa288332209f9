"""Tries layouts, all or those named, and prints what came of each; with no names those of the shared folder as well.

python -m tests.layouts [NAME ...]
"""

import sys
from collections import Counter

from tests.conftest import SHARED
from tests.layouts.layouts import LAYOUTS, layouts_in, named
from tests.layouts.trial import Result, try_layout
from tests.layouts.variations import VARIATIONS, differences


def line_of(result: Result) -> str:
    """A result in one line."""
    mark = "" if result.expected else " (!)"
    return f"{result.verdict + mark:12} {result.kind:8} {result.layout.name} | {' '.join(result.said.split())[:700]}"


def changed(read: set[tuple[str, str]]) -> int:
    """How many are read wrong, or no longer read, after changes of the file that do not change what rows say."""
    found = [(name, each) for name, change in VARIATIONS.items() for each in differences(change, LAYOUTS, read)]
    for name, each in found:
        print(f"{name}: {line_of(each)}")
    return len(found)


def main(names: list[str]) -> int:
    """1 if a layout is read wrong, else 0."""
    folder = SHARED / "data/layouts"
    shared = tuple(layouts_in(folder)) if folder.is_dir() else ()
    count, read = Counter[str](), set[tuple[str, str]]()
    for layouts in (LAYOUTS, shared):
        for layout in named(names, layouts):
            for result in try_layout(layout):
                print(line_of(result), flush=True)
                read |= {(layout.name, result.kind)} if result.verdict == "right" else set()
                count[result.verdict] += 1
                count["as expected" if result.expected else "not as expected"] += 1
    if not names:
        count["WRONG"] += changed(read)
    print(", ".join(f"{verdict}: {number}" for verdict, number in count.items()))
    return int(count["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
