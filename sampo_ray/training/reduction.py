"""Length reduction: which response tokens of a pair count, and how their log-ratios become one number per response.

A log-ratio is r_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t), in nats. SamPO's contribution is `sample`:
chosen and rejected are down-sampled to the same number of tokens, so that the implicit reward no longer grows with
length (Lu et al., EMNLP 2024, arXiv 2406.10957, Eq. 10).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sampo_ray.training.streams import Stream, pair_number

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class MaskKey:
    """All that a pair's mask depends on; batches, ranks and restarts do not matter."""

    seed: int
    round: int
    epoch: int
    pair: str

    def generator(self, stream: Stream) -> np.random.Generator:
        """A new generator for the pair's mask of the policy or of the reference."""
        return stream.generator(seed=self.seed, round=self.round, epoch=self.epoch, pair=pair_number(self.pair))


@dataclass(frozen=True)
class Positions:
    """The selected tokens of one pair's responses: positions, ascending, each in [0, T)."""

    chosen: Int64[np.ndarray, " kept_w"]
    rejected: Int64[np.ndarray, " kept_l"]


@dataclass(frozen=True)
class SequenceLogRatios:
    """Sequence log-ratios s_w and s_l of a batch of pairs in fp32 nats, and how many tokens each one stands for.

    For losses without a reference these are log-probs: r_t = log pi(y_t | x, y_<t).
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    chosen_tokens: Float[Tensor, " pairs"]
    rejected_tokens: Float[Tensor, " pairs"]

    @property
    def delta(self) -> Float[Tensor, " pairs"]:
        """s_w - s_l; times beta it is the difference of the implicit rewards."""
        return self.chosen - self.rejected


def all_positions(key: MaskKey, chosen: int, rejected: int, stream: Stream = Stream.POLICY_MASK) -> Positions:
    """Every token of both responses."""
    return Positions(np.arange(chosen), np.arange(rejected))


def sampled_positions(key: MaskKey, chosen: int, rejected: int, stream: Stream = Stream.POLICY_MASK) -> Positions:
    """min(T_w, T_l) tokens of each response, uniformly without replacement: all of the shorter one."""
    kept = min(chosen, rejected)
    rng = key.generator(stream)

    def draw(length: int) -> Int64[np.ndarray, " kept"]:
        if length == kept:
            return np.arange(length)
        return np.sort(rng.choice(length, kept, replace=False))

    return Positions(draw(chosen), draw(rejected))


ReducedPair = tuple[Tensor, Tensor, float, float]
"""s_w and s_l of one pair, and how many tokens each stands for."""


def _sum(chosen: Tensor, rejected: Tensor, length_w: int, length_l: int) -> ReducedPair:
    return chosen.sum(), rejected.sum(), len(chosen), len(rejected)


def _average(chosen: Tensor, rejected: Tensor, length_w: int, length_l: int) -> ReducedPair:
    scale = (length_w + length_l) / 2
    return chosen.mean() * scale, rejected.mean() * scale, scale, scale


def _mean(chosen: Tensor, rejected: Tensor, length_w: int, length_l: int) -> ReducedPair:
    return chosen.mean(), rejected.mean(), 1, 1


def _ld(chosen: Tensor, rejected: Tensor, length_w: int, length_l: int, alpha: float) -> ReducedPair:
    shared = min(length_w, length_l)

    def part(ratios: Tensor) -> tuple[Tensor, float]:
        return ratios[:shared].sum() + alpha * ratios[shared:].sum(), shared + alpha * (len(ratios) - shared)

    (s_w, n_w), (s_l, n_l) = part(chosen), part(rejected)
    return s_w, s_l, n_w, n_l


def _top_k(chosen: Tensor, rejected: Tensor, length_w: int, length_l: int) -> ReducedPair:
    kept = min(length_w, length_l)
    return chosen.topk(kept).values.sum(), rejected.topk(kept).values.sum(), kept, kept


@dataclass(frozen=True)
class Reduction:
    """A length reduction. `positions` selects, from lengths alone, the tokens that need log-probs; `reduce` turns one
    pair's log-ratios (w, l, T_w, T_l, and by name the fields of `method` that it needs) into two numbers.
    """

    positions: Callable[..., Positions]
    reduce: Callable[..., ReducedPair]


REDUCTIONS: dict[str, Reduction] = {
    "sum": Reduction(all_positions, _sum),
    "average": Reduction(all_positions, _average),
    "mean": Reduction(all_positions, _mean),
    "sample": Reduction(sampled_positions, _sum),
    "top_k": Reduction(all_positions, _top_k),
    "ld": Reduction(all_positions, _ld),
}
"""sum: plain DPO (Eq. 7). average: means, rescaled by (T_w + T_l)/2 (Eq. 9). mean: means per token. sample: SamPO
(Eq. 10). top_k: as `sample`, but the tokens with the largest log-ratios (Appendix G, an ablation). ld: LD-DPO (Liu et
al. 2024, arXiv 2409.06411), in which tokens beyond the length min(T_w, T_l) count alpha times."""


def reduce_pairs(
    reduction: Reduction,
    chosen: list[Float[Tensor, " kept_w"]],
    rejected: list[Float[Tensor, " kept_l"]],
    lengths: list[tuple[int, int]],
    **settings: float,
) -> SequenceLogRatios:
    """Reduces token log-ratios pair by pair, so that a pair's numbers do not depend on what else is in the batch.

    `lengths` holds (T_w, T_l), in tokens, of the whole responses; `settings` are the reduction's own.
    """
    parts = [reduction.reduce(w, r, *pair, **settings) for w, r, pair in zip(chosen, rejected, lengths, strict=True)]
    s_w, s_l, n_w, n_l = zip(*parts, strict=True)
    counts = torch.tensor([n_w, n_l], dtype=s_w[0].dtype, device=s_w[0].device)
    return SequenceLogRatios(torch.stack(s_w), torch.stack(s_l), counts[0], counts[1])
