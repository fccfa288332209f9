"""How many tokens and pairs the trainer works on at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowBudget:
    """What rows are planned for: pairs per global batch, tokens per row, and ranks that work on rows in parallel."""

    batch_size: int
    tokens_per_row: int
    world: int = 1


def default_row(max_length: int) -> int:
    """Tokens of a row for any two sequences of `max_length`; at least 4,096: each costs a pass over all gradients."""
    return max(2 * max_length, 4096)
