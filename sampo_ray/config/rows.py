"""How many tokens and pairs the trainer works on at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Attention: TypeAlias = Literal["segments", "flex", "own"]
"""How attention is computed: see `model.attention`."""


@dataclass(frozen=True)
class RowBudget:
    """What rows are planned for: pairs per global batch, tokens per row, and ranks that work on rows in parallel.

    `shared_prompts`: whether chosen and rejected share one prompt, or each has a copy and is padded.
    """

    batch_size: int
    tokens_per_row: int
    world: int = 1
    shared_prompts: bool = True


def default_row(max_length: int) -> int:
    """Tokens of a row for any two sequences of `max_length`; at least 4,096: each costs a pass over all gradients."""
    return max(2 * max_length, 4096)
