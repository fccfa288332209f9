"""The table of families, and its summary."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.families.trial import Result

TABLE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@functools.cache
def served_architectures() -> frozenset[str]:
    """The model classes that vLLM has."""
    from vllm import ModelRegistry

    return frozenset(ModelRegistry.get_supported_archs())


def line_of(result: Result) -> str:
    """A result in one line, for the terminal."""
    spec, shown = result.spec, f"{result.way} {result.logprobs:.1e} {result.gradients:.1e} {result.lora}"
    said = "; ".join(result.faults) if result.faults else result.refusal or shown
    return f"{result.verdict:8}{spec.family} | {spec.model_type} | {said}"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """The families that are not exact, with why, and the count."""
    for result in sorted(results, key=lambda each: each.verdict):
        if result.verdict != "exact":
            yield line_of(result)
    exact = sum(result.verdict == "exact" for result in results)
    yield f"{exact} of {len(results)} families exact, {100 * exact / max(1, len(results)):.1f} %"


def write_table(results: Sequence[Result]) -> None:
    """docs/families.md."""
    rows = [row_of(result) for result in results]
    head = ["family", "model type", "attention", "log-probs", "gradients", "export", "LoRA", "vLLM"]
    table = [head, ["---"] * len(head), *rows]
    TABLE.write_text("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")


def row_of(result: Result) -> list[str]:
    """A result's cells."""
    spec, vllm = result.spec, "yes" if result.architecture in served_architectures() else "no"
    if result.verdict == "wrong":
        return [spec.family, spec.model_type, f"WRONG: {'; '.join(result.faults)}", "", "", "", "", vllm]
    if result.refusal:
        return [spec.family, spec.model_type, f"refused: {result.refusal}", "", "", "", "", vllm]
    return [
        spec.family,
        spec.model_type,
        result.way,
        error(result.logprobs),
        error(result.gradients),
        result.export,
        result.lora,
        vllm,
    ]


def error(value: float) -> str:
    """An error in two digits."""
    return "" if math.isnan(value) else f"{value:.0e}"
