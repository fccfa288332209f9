"""Tries families, all or those named, and prints what came of each; with no names it writes docs/families.md as well.

python -m tests.families [FAMILY or TYPE ...]
"""

import sys

from transformers.utils import logging

from tests.families.families import named
from tests.families.report import line_of, summary, write_table
from tests.families.trial import try_family


def main(names: list[str]) -> int:
    """1 if a family is wrong, else 0."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = []
    for spec in named(names):
        results.append(try_family(spec))
        print(line_of(results[-1]), flush=True)
    if not names:
        write_table(results)
    print("\n".join(summary(results)))
    return int(any(result.verdict == "wrong" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
