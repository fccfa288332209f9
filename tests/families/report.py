"""The table of families, and its summary."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.families.families import LEFT_OUT
from tests.families.trial import MAX_LENGTH, Result

TABLE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = ("family", "model type", "attention", "log-probs", "gradients", "export", "LoRA", "vLLM")
INTRODUCTION = f"""# Families of models

`make families` writes this page. It makes a small random model of each family of transformers 5.19 that generates text,
with what is special of the family switched on, and tries it in fp32 against plain transformers: validation, training,
export, LoRA. Rows hold several pairs, some with the same prompt. Sequences have up to {MAX_LENGTH} tokens, windows and
chunks 16. Gradient checkpointing is on.

* attention: what a run chooses. `segments` compute a prompt once for both answers, `own` is the model's own attention;
  see [operators.md](operators.md).
* log-probs: the largest difference of a token's log-prob, nats.
* gradients: the largest difference of a parameter's gradient, relative to its norm.
* export: `same` if its tensors are those that `save_pretrained` writes, and give the same log-probs to the bit.
* LoRA: the layers that `all-linear` adapts, and how far the adapted model is from the one they are merged into, nats.
* vLLM: whether it has the architecture.

A family is exact if the first two are below 1e-4 and the export is the same. What is refused is refused by `--dry-run`,
with the message that is shown.
"""


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
    yield count_of(results)


def count_of(results: Sequence[Result]) -> str:
    """How many are exact."""
    exact = sum(result.verdict == "exact" for result in results)
    return f"{exact} of {len(results)} families exact, {100 * exact / max(1, len(results)):.1f} %"


def write_table(results: Sequence[Result]) -> None:
    """docs/families.md."""
    ways = Counter(result.way for result in results if result.verdict == "exact")
    counts = ", ".join(f"{count} by `{way}`" for way, count in ways.most_common())
    reasons = {reason: [name for name, why in LEFT_OUT.items() if why == reason] for reason in LEFT_OUT.values()}
    left_out = [f"* {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    parts = [
        INTRODUCTION,
        f"{count_of(results)}: {counts}.\n",
        "\n".join(as_row(cells) for cells in (HEAD, ["---"] * len(HEAD), *map(cells_of, results))),
        "\nThese types are not tried:\n",
        "\n".join(left_out),
    ]
    TABLE.write_text("\n".join(parts) + "\n")


def as_row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def cells_of(result: Result) -> list[str]:
    """A result's cells."""
    spec, vllm = result.spec, "yes" if result.architecture in served_architectures() else "no"
    first, last = [spec.family, spec.model_type], [vllm]
    if result.verdict == "wrong":
        return [*first, f"WRONG: {'; '.join(result.faults)}", "", "", "", "", *last]
    if result.refusal:
        return [*first, f"refused: {result.refusal}", "", "", "", "", *last]
    errors = [error(result.logprobs), error(result.gradients)]
    return [*first, result.way, *errors, result.export, result.lora, *last]


def error(value: float) -> str:
    """An error in one digit."""
    return "" if math.isnan(value) else f"{value:.0e}"
