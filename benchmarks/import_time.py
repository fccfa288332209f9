"""How long commands that do not train take to answer: this checkout against another one, by turns.

    python benchmarks/import_time.py OTHER_CHECKOUT

Both run in this environment, each in new processes, with a new run directory for `sampo versions`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import partial
from pathlib import Path

import _measure
from _measure import Target

from sampo_ray.config.run import load_config
from sampo_ray.run.directory import create_run

HERE = Path(__file__).resolve().parents[1]
TARGETS = {"help_speedup": Target(at_least=5.0), "versions_speedup": Target(at_least=5.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5, help="how often the sides take turns")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": f"{folder}/run"}}
        create_run(load_config(tree))
        for name, words in {"help": ["--help"], "versions": ["versions", f"{folder}/run"]}.items():
            sides = {side: partial(seconds, top, words) for side, top in (("this", HERE), ("other", args.other))}
            taken = _measure.take_turns(sides, args.repeats)
            ratios[f"{name}_speedup"] = [b / a for a, b in zip(taken["this"], taken["other"], strict=True)]
            rows.append((f"sampo {words[0]}", *(_measure.spread(taken[side], 2) for side in ("this", "other"))))
    _measure.show("seconds to answer", ("command", "this checkout", "the other"), rows)
    _measure.report("import_time", ratios, TARGETS)


def seconds(top: Path, words: list[str], turn: int) -> float:
    """How long a new process takes for `sampo` with these words, in the checkout at `top`."""
    module, _, function = tomllib.loads((top / "pyproject.toml").read_text())["project"]["scripts"]["sampo"].partition(
        ":"
    )
    code = f"import sys; from {module} import {function} as main; sys.argv[0] = 'sampo'; main()"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=top,
        env={**os.environ, "PYTHONPATH": str(top)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
