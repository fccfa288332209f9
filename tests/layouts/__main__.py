"""Tries layouts, all or those named, and prints what came of each; with no names those of the shared folder as well.

python -m tests.layouts [NAME ...]
"""

import sys
from collections import Counter

from tests.conftest import SHARED
from tests.layouts.layouts import LAYOUTS, layouts_in, named
from tests.layouts.trial import Result, try_layout


def line_of(result: Result) -> str:
    """A result in one line."""
    mark = "" if result.expected else " (!)"
    return f"{result.verdict + mark:12} {result.kind:8} {result.layout.name} | {' '.join(result.said.split())[:700]}"


def main(names: list[str]) -> int:
    """1 if a layout is read wrong, else 0."""
    folder = SHARED / "data/layouts"
    shared = tuple(layouts_in(folder)) if folder.is_dir() else ()
    count = Counter[str]()
    for layouts in (LAYOUTS, shared):
        for layout in named(names, layouts):
            for result in try_layout(layout):
                print(line_of(result), flush=True)
                count[result.verdict] += 1
                count["as expected" if result.expected else "not as expected"] += 1
    print(", ".join(f"{verdict}: {number}" for verdict, number in count.items()))
    return int(count["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
