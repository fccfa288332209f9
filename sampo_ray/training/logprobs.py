"""From hidden states to token log-probabilities, only at the positions that are asked for, in tiles.

Neither forward nor backward ever holds a [tokens, vocabulary] tensor: logits come in tiles of some tokens by some words
of the vocabulary, and are computed again in the backward pass. The words' loop is the outer one, so that each part of
the head's weight is read, and the gradient of it written, once. Tiles have a fixed shape, so that a token's result does
not depend on how many others are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sampo_ray.training.cpu import bf16_products

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of logits: enough tokens to keep the device busy, few enough words for 64 MiB at most."""

    tokens: int
    words: int

    @classmethod
    def of(cls, device: torch.device) -> Tile:
        return cls(128, 8192) if device.type == "cpu" else cls(1024, 16384)


def token_logprobs(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int64[Tensor, " tokens"],
    tile: Tile | None = None,
) -> Float[Tensor, " tokens"]:
    """log softmax(hidden @ weight^T)[target] of each row, nats, in fp32 (fp64 for fp64 inputs); differentiable.

    Of bf16 inputs the logits are exact products summed in fp32; in the backward pass the logits' gradients are rounded
    to bf16 before they are multiplied where the device has bf16 arithmetic.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, tile or Tile.of(hidden.device))


def token_comparisons(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    reference_hidden: Float[Tensor, "tokens reference_dim"],
    reference_weight: Float[Tensor, "vocabulary reference_dim"],
    targets: Int64[Tensor, " tokens"],
    tile: Tile | None = None,
) -> Float[Tensor, "3 tokens"]:
    """Log-probs of the targets under the policy, as `token_logprobs`, and under a reference, and KL(reference ||
    policy) over the whole vocabulary at each token, nats; in one walk over the tiles.

    The reference's distribution is softmax(reference_hidden @ reference_weight^T). Differentiable in the policy's
    `hidden` and `weight`; the divergence is exactly 0 where both are the reference's.
    """
    tile = tile or Tile.of(hidden.device)
    return torch.stack(_TokenComparisons.apply(hidden, weight, reference_hidden, reference_weight, targets, tile))


class TiledHead(nn.Module):
    """Takes the place of a model's output embedding; a module of its own, so that ZeRO-3 gathers its weight around the
    call.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.weight, targets)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, tile: Tile) -> Tensor:  # type: ignore[no-untyped-def]
        states, wanted = _filled(_operand(hidden), tile), _filled(targets, tile)
        picked = states.new_zeros(len(states), dtype=_accumulator(weight.dtype))
        sums = _Sums(picked)
        with bf16_products(of=weight):
            for words, part in _parts(weight, tile):
                for some in _rows(states, tile):
                    logits = _product(states[some], part.T, picked.dtype)
                    place, here = _places(wanted[some], words)
                    picked[some] += logits.gather(1, place)[:, 0] * here
                    sums.add(some, logits)
        normalizer = sums.log()
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.tile = tile
        return (picked - normalizer)[: len(hidden)]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        hidden, weight, targets, normalizer = ctx.saved_tensors
        states, wanted, given = (_filled(x, ctx.tile) for x in (_operand(hidden), targets, grad.to(normalizer.dtype)))

        def by_logits(some: slice, words: slice, part: Tensor) -> Tensor:
            """d log p(target) / d logits = onehot(target) - softmax"""
            tile = _product(states[some], part.T, normalizer.dtype)
            tile.sub_(normalizer[some, None]).exp_().mul_(-given[some, None])
            place, here = _places(wanted[some], words)
            return tile.scatter_add_(1, place, (given[some] * here)[:, None])

        return *_gradients(ctx, hidden, states, weight, _parts(weight, ctx.tile), by_logits), None, None


class _TokenComparisons(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        targets: Tensor,
        tile: Tile,
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, others = (_filled(_operand(x), tile) for x in (hidden, reference_hidden))
        wanted = _filled(targets, tile)
        excess, picked, others_picked = states.new_zeros(3, len(states), dtype=_accumulator(weight.dtype))
        sums, reference_sums = _Sums(excess), _Sums(excess)
        with bf16_products(of=weight):
            for words, part, other in _both_parts(weight, reference_weight, tile):
                for some in _rows(states, tile):
                    logits = _product(states[some], part.T, excess.dtype)
                    reference = _product(others[some], other.T, excess.dtype)
                    place, here = _places(wanted[some], words)
                    picked[some] += logits.gather(1, place)[:, 0] * here
                    others_picked[some] += reference.gather(1, place)[:, 0] * here
                    difference = reference - logits
                    sums.add(some, logits)
                    excess[some] *= reference_sums.add(some, reference)
                    excess[some] += difference.mul_(reference).sum(1)  # `reference` is exp(logits - peak) by now
        normalizer, reference_normalizer = sums.log(), reference_sums.log()
        tensors = hidden, weight, reference_hidden, reference_weight, targets, normalizer, reference_normalizer
        ctx.save_for_backward(*tensors)
        ctx.tile = tile
        divergences = excess / reference_sums.total + normalizer - reference_normalizer
        found = picked - normalizer, others_picked - reference_normalizer, divergences
        ours, theirs, divergences = (each[: len(hidden)] for each in found)
        ctx.mark_non_differentiable(theirs)
        return ours, theirs, divergences

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, of_logprobs: Tensor, _: Tensor, of_divergences: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, reference_hidden, reference_weight, targets, ours, theirs = ctx.saved_tensors
        states, others = (_filled(_operand(x), ctx.tile) for x in (hidden, reference_hidden))
        wanted = _filled(targets, ctx.tile)
        by_logprob, by_divergence = (_filled(x.to(ours.dtype), ctx.tile) for x in (of_logprobs, of_divergences))

        def by_logits(some: slice, words: slice, part: Tensor, other: Tensor) -> Tensor:
            """d log p(target) = onehot(target) - softmax; d KL(reference || policy) = softmax - the reference's"""
            tile = _product(states[some], part.T, ours.dtype).sub_(ours[some, None]).exp_()
            reference = _product(others[some], other.T, ours.dtype).sub_(theirs[some, None]).exp_()
            tile.mul_((by_divergence - by_logprob)[some, None]).sub_(reference.mul_(by_divergence[some, None]))
            place, here = _places(wanted[some], words)
            return tile.scatter_add_(1, place, (by_logprob[some] * here)[:, None])

        parts = _both_parts(weight, reference_weight, ctx.tile)
        return *_gradients(ctx, hidden, states, weight, parts, by_logits), None, None, None, None


def _gradients(  # type: ignore[no-untyped-def]
    ctx,
    hidden: Tensor,
    states: Tensor,
    weight: Tensor,
    parts: Iterator[tuple[Any, ...]],
    by_logits: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Those of hidden states and weight, from that of each tile of logits: by_logits(tokens, *part)."""
    of_states = torch.zeros_like(states, dtype=_accumulator(weight.dtype))
    of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # the head may be frozen
    memory = _memory(weight, ctx.tile) if of_weight is not None else None
    with bf16_products(of=weight):
        for words, part, *rest in parts:
            of_part = memory[: len(part)].zero_() if memory is not None else None
            for some in _rows(states, ctx.tile):
                tile = by_logits(some, words, part, *rest)
                of_states[some] += _product(tile, part, of_states.dtype)
                if of_part is not None:
                    _add_product(of_part, tile.T, states[some])
            if of_weight is not None and of_part is not None:
                of_weight[words] = of_part
    return of_states[: len(hidden)].to(hidden.dtype), of_weight


class _Sums:
    """The running sum of exp(logits) of each token, over the parts of the vocabulary: exp(peak) * total."""

    def __init__(self, like: Tensor) -> None:
        self.peak, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def add(self, some: slice, logits: Tensor) -> Tensor:
        """Takes a tile in, and leaves exp(logits - peak) in it; returns what sums with the peak before are to be
        multiplied by, [tokens].
        """
        peak = torch.maximum(self.peak[some], logits.amax(1))
        scale = (self.peak[some] - peak).exp_()
        self.total[some] *= scale
        self.total[some] += logits.sub_(peak[:, None]).exp_().sum(1)
        self.peak[some] = peak
        return scale

    def log(self) -> Tensor:
        return self.peak + self.total.log()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: Tensor) -> Tensor:
    """A factor as the products want it: on CPU a copy in fp32, since `mm` has no `out_dtype` there."""
    return x.to(_accumulator(x.dtype)) if x.device.type == "cpu" else x


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right with sums in `dtype`; the left one is rounded to the right one's dtype."""
    left = left.to(right.dtype)
    return left @ right if right.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second tensor of the total's size where the backend can."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right, total.dtype)


def _filled(x: Tensor, tile: Tile) -> Tensor:
    """Zeros appended up to a multiple of the tile's tokens."""
    return nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % tile.tokens))


def _parts(weight: Tensor, tile: Tile) -> Iterator[tuple[slice, Tensor]]:
    """The weight by tiles' words; copies of them share their memory, so each is good until the next."""
    copies = _operand(weight[:0]).dtype != weight.dtype
    memory = _memory(weight, tile) if copies else None
    for start in range(0, len(weight), tile.words):
        words = slice(start, min(start + tile.words, len(weight)))
        part = weight[words]
        yield words, part if memory is None else memory[: len(part)].copy_(part)


def _both_parts(weight: Tensor, other: Tensor, tile: Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for (words, part), (_, counterpart) in zip(_parts(weight, tile), _parts(other, tile), strict=True):
        yield words, part, counterpart


def _memory(weight: Tensor, tile: Tile) -> Tensor:
    """Memory for one part of the weight, in the dtype of sums."""
    return weight.new_empty(min(tile.words, len(weight)), weight.shape[1], dtype=_accumulator(weight.dtype))


def _rows(states: Tensor, tile: Tile) -> Iterator[slice]:
    return (slice(start, start + tile.tokens) for start in range(0, len(states), tile.tokens))


def _places(targets: Tensor, words: slice) -> tuple[Int64[Tensor, "tokens 1"], Tensor]:
    """Columns of the targets in the words' tile, and whether they are among these at all."""
    here = (targets >= words.start) & (targets < words.stop)
    return (targets - words.start).clamp_(0, words.stop - words.start - 1)[:, None], here
