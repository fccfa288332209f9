"""Statistics of earlier steps, for losses that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """Mean rewards (beta * nats) of the steps of a round so far, over the pairs of all ranks.

    `chosen` and `rejected` are those of the last step, `both` the mean over the two responses of all `pairs` so far. A
    round's policy starts as its reference, so all of them start at exactly 0.
    """

    chosen: float = 0.0
    rejected: float = 0.0
    both: float = 0.0
    pairs: int = 0

    def after(self, metrics: Mapping[str, float], pairs: int) -> Statistics:
        """The statistics after a step of `pairs` pairs with these mean metrics."""
        chosen, rejected, total = metrics["chosen_reward"], metrics["rejected_reward"], self.pairs + pairs
        both = self.both + ((chosen + rejected) / 2 - self.both) * pairs / total
        return Statistics(chosen, rejected, both, total)
