"""A row for a model's own attention: each answer behind a copy of its prompt, alone or in two batches by length.

Alone, an answer takes the very operations of a plain forward pass, so its bits do not depend on what else is in the
row. On CPUs that costs nothing. GPUs are faster with batches, and ZeRO-3 needs them, two whatever is in the row: each
pass through the model is collective there, and ranks with different numbers of passes would wait for each other for
ever. With the shorter answers apart from the longer ones, a pair alone has no padding, and the rows of a batch that are
planned by `padded_tokens` have little.

Where a model picks the best of a sequence's keys, as DeepSeek-V3.2's indexer does, which of equal ones it picks goes by
the length of the batch. Answers with more tokens than it picks are then alone in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sampo_ray.training.batching import Segments, split

if TYPE_CHECKING:
    from jaxtyping import Int64


@dataclass(frozen=True, eq=False)
class Sequences:
    """Each answer of a row behind its prompt, as row positions, in batches padded on the right.

    `before`: of each row position the place of the token before it, in the batches as one list of tokens: of an answer,
    in its own sequence; of a prompt, in the first that has it.
    """

    batches: tuple[Int64[Tensor, "answers longest"], ...]
    before: Int64[Tensor, " tokens"]

    @classmethod
    def of(
        cls, segments: tuple[Segments, ...], tokens: int, boundary: int | None = None, picked: int | None = None
    ) -> Sequences:
        """Those of a row of `tokens`; `boundary`: see `split`. Answers of more than `picked` tokens are alone: with 0,
        all are.
        """
        answers = [_positions(pair, *answer) for pair in segments for answer in _answers(pair)]
        answers.sort(key=len, reverse=True)
        alone = 0 if picked is None else sum(len(answer) > picked for answer in answers)
        others = answers[alone:]
        at = split(np.array([len(answer) for answer in others]), boundary) if len(others) > 1 else 0
        parts = [*([answer] for answer in answers[:alone]), others[:at], others[at:]]
        before, batches, start = np.full(tokens, -1), list[Tensor](), 0
        for part in filter(None, parts):
            longest = len(part[0])
            # Filled with a token of its own: a padding token might mean something to the model.
            batch = np.stack([np.pad(answer, (0, longest - len(answer)), mode="edge") for answer in part])
            for index, answer in enumerate(part):
                new = before[answer] < 0
                before[answer[new]] = start + index * longest + (np.flatnonzero(new) - 1).clip(0)
            start += batch.size
            batches.append(torch.from_numpy(batch))
        return cls(tuple(batches), torch.from_numpy(before.clip(0)))

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(tuple(batch.to(device) for batch in self.batches), self.before.to(device))


def _answers(pair: Segments) -> tuple[tuple[int, int], tuple[int, int]]:
    return (pair.chosen_start, pair.chosen), (pair.rejected_start, pair.rejected)


def _positions(pair: Segments, start: int, length: int) -> Int64[np.ndarray, " tokens"]:
    return np.concatenate(
        [np.arange(pair.prompt_start, pair.prompt_start + pair.prompt), np.arange(start, start + length)]
    )
