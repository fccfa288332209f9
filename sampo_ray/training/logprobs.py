"""From hidden states to token log-probabilities, only at selected positions, in tiles.

Neither forward nor backward ever holds a [tokens, vocabulary] tensor: logits come in tiles of some tokens by some
entries of the vocabulary, and are computed again in the backward pass. The loop over the vocabulary is the outer one,
so each part of the head's weight is read once, and its gradient written once. Tiles have a fixed shape, so a token's
result does not depend on how many others are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sampo_ray.training import cpu

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of logits: enough tokens to keep the device busy, and at most 64 MiB."""

    tokens: int
    vocabulary: int

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
    logprobs: Tensor = _TokenLogProbs.apply(hidden, weight, targets, tile or Tile.of(hidden.device))
    return logprobs


def token_comparisons(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    reference_hidden: Float[Tensor, "tokens reference_dim"],
    reference_weight: Float[Tensor, "vocabulary reference_dim"],
    targets: Int64[Tensor, " tokens"],
    tile: Tile | None = None,
) -> Float[Tensor, "3 tokens"]:
    """Log-probs of the targets under the policy, as `token_logprobs`, and under a reference, and KL(reference ||
    policy) over the whole vocabulary at each token, nats; all in one pass over the tiles.

    The reference's distribution is softmax(reference_hidden @ reference_weight^T). Differentiable in the policy's
    `hidden` and `weight`; the divergence is exactly 0 where both are the reference's.
    """
    tile = tile or Tile.of(hidden.device)
    return torch.stack(_TokenComparisons.apply(hidden, weight, reference_hidden, reference_weight, targets, tile))


class TiledHead(nn.Module):
    """Replaces a model's output embedding. It is a module, so that ZeRO-3 gathers its weight around the call."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.weight, targets)


class _Context(cpu.Context, Protocol):
    tile: Tile

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, weight: Tensor, targets: Tensor, tile: Tile) -> Tensor:
        states, padded_targets = _filled(_operand(hidden), tile), _filled(targets, tile)
        picked = states.new_zeros(len(states), dtype=_accumulator(weight.dtype))
        sums = _Sums(picked)
        with cpu.bf16_products(of=weight):
            for columns, part in _parts(weight, tile):
                for rows in _rows(states, tile):
                    logits = _product(states[rows], part.T, picked.dtype)
                    column, inside = _columns_of(padded_targets[rows], columns)
                    picked[rows] += logits.gather(1, column)[:, 0] * inside
                    sums.add(rows, logits)
        normalizer = sums.log()
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.tile = tile
        return (picked - normalizer)[: len(hidden)]

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        states, padded_targets, upstream = (
            _filled(x, ctx.tile) for x in (_operand(hidden), targets, grad.to(normalizer.dtype))
        )

        def by_logits(rows: slice, columns: slice, part: Tensor) -> Tensor:
            """d log p(target) / d logits = onehot(target) - softmax"""
            tile = _product(states[rows], part.T, normalizer.dtype)
            tile.sub_(normalizer[rows, None]).exp_().mul_(-upstream[rows, None])
            column, inside = _columns_of(padded_targets[rows], columns)
            return tile.scatter_add_(1, column, (upstream[rows] * inside)[:, None])

        return *_gradients(ctx, hidden, states, weight, _parts(weight, ctx.tile), by_logits), None, None


class _TokenComparisons(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        targets: Tensor,
        tile: Tile,
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, reference_states = (_filled(_operand(x), tile) for x in (hidden, reference_hidden))
        padded_targets = _filled(targets, tile)
        excess, picked, reference_picked = states.new_zeros(3, len(states), dtype=_accumulator(weight.dtype))
        sums, reference_sums = _Sums(excess), _Sums(excess)
        with cpu.bf16_products(of=weight):
            for columns, part, other in _both_parts(weight, reference_weight, tile):
                for rows in _rows(states, tile):
                    logits = _product(states[rows], part.T, excess.dtype)
                    reference = _product(reference_states[rows], other.T, excess.dtype)
                    column, inside = _columns_of(padded_targets[rows], columns)
                    picked[rows] += logits.gather(1, column)[:, 0] * inside
                    reference_picked[rows] += reference.gather(1, column)[:, 0] * inside
                    difference = reference - logits
                    sums.add(rows, logits)
                    excess[rows] *= reference_sums.add(rows, reference)
                    excess[rows] += difference.mul_(reference).sum(1)  # `reference` is now exp(logits - peak)
        normalizer, reference_normalizer = sums.log(), reference_sums.log()
        tensors = hidden, weight, reference_hidden, reference_weight, targets, normalizer, reference_normalizer
        ctx.save_for_backward(*tensors)
        ctx.tile = tile
        divergences = excess / reference_sums.total + normalizer - reference_normalizer
        found = picked - normalizer, reference_picked - reference_normalizer, divergences
        logprobs, reference_logprobs, divergences = (each[: len(hidden)] for each in found)
        ctx.mark_non_differentiable(reference_logprobs)
        return logprobs, reference_logprobs, divergences

    @staticmethod
    def backward(ctx: _Context, of_logprobs: Tensor, _: Tensor, of_divergences: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, reference_hidden, reference_weight, targets, *normalizers = ctx.saved_tensors
        normalizer, reference_normalizer = normalizers
        states, reference_states = (_filled(_operand(x), ctx.tile) for x in (hidden, reference_hidden))
        padded_targets = _filled(targets, ctx.tile)
        by_logprob, by_divergence = (_filled(x.to(normalizer.dtype), ctx.tile) for x in (of_logprobs, of_divergences))

        def by_logits(rows: slice, columns: slice, part: Tensor, other: Tensor) -> Tensor:
            """d log p(target) = onehot(target) - softmax; d KL(reference || policy) = softmax - the reference's"""
            tile = _product(states[rows], part.T, normalizer.dtype).sub_(normalizer[rows, None]).exp_()
            reference = _product(reference_states[rows], other.T, normalizer.dtype)
            reference.sub_(reference_normalizer[rows, None]).exp_()
            tile.mul_((by_divergence - by_logprob)[rows, None]).sub_(reference.mul_(by_divergence[rows, None]))
            column, inside = _columns_of(padded_targets[rows], columns)
            return tile.scatter_add_(1, column, (by_logprob[rows] * inside)[:, None])

        parts = _both_parts(weight, reference_weight, ctx.tile)
        return *_gradients(ctx, hidden, states, weight, parts, by_logits), None, None, None, None


def _gradients(
    ctx: _Context,
    hidden: Tensor,
    states: Tensor,
    weight: Tensor,
    parts: Iterator[tuple[slice, Tensor, *tuple[Tensor, ...]]],
    by_logits: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden states and weight, from that of each tile of logits: by_logits(tokens, *part)."""
    of_states = torch.zeros_like(states, dtype=_accumulator(weight.dtype))
    of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # the head may be frozen
    memory = _memory(weight, ctx.tile) if of_weight is not None else None
    with cpu.bf16_products(of=weight):
        for columns, part, *rest in parts:
            of_part = memory[: len(part)].zero_() if memory is not None else None
            for rows in _rows(states, ctx.tile):
                tile = by_logits(rows, columns, part, *rest)
                of_states[rows] += _product(tile, part, of_states.dtype)
                if of_part is not None:
                    _add_product(of_part, tile.T, states[rows])
            if of_weight is not None and of_part is not None:
                of_weight[columns] = of_part
    return of_states[: len(hidden)].to(hidden.dtype), of_weight


class _Sums:
    """The running sum of exp(logits) of each token, over the parts of the vocabulary: exp(peak) * total."""

    def __init__(self, like: Tensor) -> None:
        self.peak, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def add(self, rows: slice, logits: Tensor) -> Tensor:
        """Overwrites a tile with exp(logits - peak) and adds it; returns the factor from the old peak to the new."""
        peak = torch.maximum(self.peak[rows], logits.amax(1))
        scale = (self.peak[rows] - peak).exp_()
        self.total[rows] *= scale
        self.total[rows] += logits.sub_(peak[:, None]).exp_().sum(1)
        self.peak[rows] = peak
        return scale

    def log(self) -> Tensor:
        return self.peak + self.total.log()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: Tensor) -> Tensor:
    """A factor of a product: on CPU a copy in fp32, since `mm` has no `out_dtype` there."""
    return x.to(_accumulator(x.dtype)) if x.device.type == "cpu" else x


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right with sums in `dtype`; `left` is rounded to the dtype of `right`."""
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
    """The weight in parts of a tile's vocabulary; copies share their memory, so each is valid until the next."""
    copies = _operand(weight[:0]).dtype != weight.dtype
    memory = _memory(weight, tile) if copies else None
    for start in range(0, len(weight), tile.vocabulary):
        columns = slice(start, min(start + tile.vocabulary, len(weight)))
        part = weight[columns]
        yield columns, part if memory is None else memory[: len(part)].copy_(part)


def _both_parts(weight: Tensor, other: Tensor, tile: Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for (columns, part), (_, counterpart) in zip(_parts(weight, tile), _parts(other, tile), strict=True):
        yield columns, part, counterpart


def _memory(weight: Tensor, tile: Tile) -> Tensor:
    """Memory for one part of the weight, in the dtype of sums."""
    return weight.new_empty(min(tile.vocabulary, len(weight)), weight.shape[1], dtype=_accumulator(weight.dtype))


def _rows(states: Tensor, tile: Tile) -> Iterator[slice]:
    return (slice(start, start + tile.tokens) for start in range(0, len(states), tile.tokens))


def _columns_of(targets: Tensor, columns: slice) -> tuple[Int64[Tensor, "tokens 1"], Tensor]:
    """The targets' columns in a tile of these columns, and whether they are in it."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return (targets - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None], inside
