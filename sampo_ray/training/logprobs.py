"""From hidden states to token log-probabilities, only at selected positions, in tiles.

Neither forward nor backward ever holds a [tokens, vocabulary] tensor: logits come in tiles of some tokens by some
entries of the vocabulary, and are computed again in the backward pass. The loop over the vocabulary is the outer one,
so each part of the head's weight is read once, and its gradient written once. Tiles have a fixed shape, so a token's
result does not depend on how many others are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sampo_ray.training import cpu

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class LogitShape:
    """How logits follow from a head's products: scale * products or, with a cap, cap * tanh(scale * products / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def logits_of(self, products: Tensor) -> Tensor:
        """The logits, in place of the products."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def slopes_at(self, logits: Tensor) -> Tensor | float:
        """d logits / d products."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().mul_(-self.scale).add_(self.scale)


@dataclass(frozen=True)
class Distributions:
    """Distributions over the next token: softmax(shape of (hidden @ weight^T + bias))."""

    hidden: Float[Tensor, "tokens dim"]
    weight: Float[Tensor, "vocabulary dim"]
    bias: Float[Tensor, " vocabulary"] | None = None
    shape: LogitShape = LogitShape()

    @property
    def dtype(self) -> torch.dtype:
        """That of logits and sums."""
        return _accumulator(self.weight.dtype)

    def logits(self, states: Tensor, part: Tensor, columns: slice) -> Tensor:
        """A tile of logits, of some tokens' states and a part of the weight."""
        products = _product(states, part.T, self.dtype)
        if self.bias is not None:
            products += self.bias[columns]
        return self.shape.logits_of(products)


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of logits: enough tokens to keep the device busy, and at most 64 MiB."""

    tokens: int
    vocabulary: int

    @classmethod
    def of(cls, device: torch.device) -> Tile:
        return cls(128, 8192) if device.type == "cpu" else cls(1024, 16384)


def token_logprobs(
    of: Distributions, targets: Int64[Tensor, " tokens"], tile: Tile | None = None
) -> Float[Tensor, " tokens"]:
    """The log-probability of each token's target, nats, in fp32 (fp64 for fp64 inputs); differentiable in the hidden
    states, the weight and the bias.

    Of bf16 inputs the products are exact and summed in fp32; in the backward pass their gradients are rounded to bf16
    before they are multiplied where the device has bf16 arithmetic.
    """
    settings = _Settings(of.shape, tile or Tile.of(of.hidden.device))
    logprobs: Tensor = _TokenLogProbs.apply(of.hidden, of.weight, of.bias, targets, settings)
    return logprobs


def token_comparisons(
    of: Distributions, reference: Distributions, targets: Int64[Tensor, " tokens"], tile: Tile | None = None
) -> Float[Tensor, "3 tokens"]:
    """Log-probs of the targets under the policy, as `token_logprobs`, and under a reference, and KL(reference ||
    policy) over the whole vocabulary at each token, nats; all in one pass over the tiles.

    Differentiable in what the policy's distributions are made of; the divergence is exactly 0 where the reference's are
    made of the same.
    """
    settings = _Settings(of.shape, tile or Tile.of(of.hidden.device))
    return torch.stack(_TokenComparisons.apply(of.hidden, of.weight, of.bias, reference, targets, settings))


class _Settings(NamedTuple):
    shape: LogitShape
    tile: Tile


class _Context(cpu.Context, Protocol):
    settings: _Settings
    reference_shape: LogitShape

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        shape, tile = settings
        policy = Distributions(hidden, weight, bias, shape)
        states, padded_targets = _filled(_operand(hidden), tile), _filled(targets, tile)
        picked = states.new_zeros(len(states), dtype=policy.dtype)
        sums = _Sums(picked)
        with cpu.bf16_products(of=weight):
            for columns, part in _parts(weight, tile):
                for rows in _rows(states, tile):
                    logits = policy.logits(states[rows], part, columns)
                    column, inside = _columns_of(padded_targets[rows], columns)
                    picked[rows] += logits.gather(1, column)[:, 0] * inside
                    sums.add(rows, logits)
        normalizer = sums.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.settings = settings
        return (picked - normalizer)[: len(hidden)]

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        shape, tile = ctx.settings
        policy = Distributions(hidden, weight, bias, shape)
        states, padded_targets, upstream = (
            _filled(x, tile) for x in (_operand(hidden), targets, grad.to(normalizer.dtype))
        )

        def by_products(rows: slice, columns: slice, part: Tensor) -> Tensor:
            """d log p(target) / d logits = onehot(target) - softmax"""
            logits = policy.logits(states[rows], part, columns)
            slopes = shape.slopes_at(logits)
            logits.sub_(normalizer[rows, None]).exp_().mul_(-upstream[rows, None])
            column, inside = _columns_of(padded_targets[rows], columns)
            return _times(logits.scatter_add_(1, column, (upstream[rows] * inside)[:, None]), slopes)

        return *_gradients(ctx, policy, states, _parts(weight, tile), by_products), None, None


class _TokenComparisons(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Distributions,
        targets: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape, tile = settings
        policy = Distributions(hidden, weight, bias, shape)
        states, reference_states = (_filled(_operand(x), tile) for x in (hidden, reference.hidden))
        padded_targets = _filled(targets, tile)
        excess, picked, reference_picked = states.new_zeros(3, len(states), dtype=policy.dtype)
        sums, reference_sums = _Sums(excess), _Sums(excess)
        with cpu.bf16_products(of=weight):
            for columns, part, other in _both_parts(weight, reference.weight, tile):
                for rows in _rows(states, tile):
                    logits = policy.logits(states[rows], part, columns)
                    theirs = reference.logits(reference_states[rows], other, columns)
                    column, inside = _columns_of(padded_targets[rows], columns)
                    picked[rows] += logits.gather(1, column)[:, 0] * inside
                    reference_picked[rows] += theirs.gather(1, column)[:, 0] * inside
                    difference = theirs - logits
                    sums.add(rows, logits)
                    excess[rows] *= reference_sums.add(rows, theirs)
                    excess[rows] += difference.mul_(theirs).sum(1)  # `theirs` is now exp(logits - peak)
        normalizer, reference_normalizer = sums.log(), reference_sums.log()
        tensors = reference.hidden, reference.weight, reference.bias, targets, normalizer, reference_normalizer
        ctx.save_for_backward(hidden, weight, bias, *tensors)
        ctx.settings, ctx.reference_shape = settings, reference.shape
        divergences = excess / reference_sums.total + normalizer - reference_normalizer
        found = picked - normalizer, reference_picked - reference_normalizer, divergences
        logprobs, reference_logprobs, divergences = (each[: len(hidden)] for each in found)
        ctx.mark_non_differentiable(reference_logprobs)
        return logprobs, reference_logprobs, divergences

    @staticmethod
    def backward(ctx: _Context, of_logprobs: Tensor, _: Tensor, of_divergences: Tensor) -> tuple[Tensor | None, ...]:
        shape, tile = ctx.settings
        hidden, weight, bias, *tensors = ctx.saved_tensors
        reference_hidden, reference_weight, reference_bias, targets, normalizer, reference_normalizer = tensors
        policy = Distributions(hidden, weight, bias, shape)
        reference = Distributions(reference_hidden, reference_weight, reference_bias, ctx.reference_shape)
        states, reference_states = (_filled(_operand(x), tile) for x in (policy.hidden, reference.hidden))
        padded_targets = _filled(targets, tile)
        by_logprob, by_divergence = (_filled(x.to(normalizer.dtype), tile) for x in (of_logprobs, of_divergences))

        def by_products(rows: slice, columns: slice, part: Tensor, other: Tensor) -> Tensor:
            """d log p(target) = onehot(target) - softmax; d KL(reference || policy) = softmax - the reference's"""
            logits = policy.logits(states[rows], part, columns)
            slopes = shape.slopes_at(logits)
            logits.sub_(normalizer[rows, None]).exp_()
            theirs = reference.logits(reference_states[rows], other, columns)
            theirs.sub_(reference_normalizer[rows, None]).exp_()
            logits.mul_((by_divergence - by_logprob)[rows, None]).sub_(theirs.mul_(by_divergence[rows, None]))
            column, inside = _columns_of(padded_targets[rows], columns)
            return _times(logits.scatter_add_(1, column, (by_logprob[rows] * inside)[:, None]), slopes)

        parts = _both_parts(policy.weight, reference.weight, tile)
        return *_gradients(ctx, policy, states, parts, by_products), None, None, None


def _gradients(
    ctx: _Context,
    policy: Distributions,
    states: Tensor,
    parts: Iterator[tuple[slice, Tensor, *tuple[Tensor, ...]]],
    by_products: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, from that of each tile of products: by_products(tokens, *part)."""
    tile, (hidden, weight, bias) = ctx.settings.tile, (policy.hidden, policy.weight, policy.bias)
    of_states = torch.zeros_like(states, dtype=policy.dtype)
    of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # the head may be frozen
    of_bias = torch.zeros_like(bias, dtype=policy.dtype) if bias is not None and ctx.needs_input_grad[2] else None
    memory = _memory(weight, tile) if of_weight is not None else None
    with cpu.bf16_products(of=weight):
        for columns, part, *rest in parts:
            of_part = memory[: len(part)].zero_() if memory is not None else None
            for rows in _rows(states, tile):
                of_products = by_products(rows, columns, part, *rest)
                of_states[rows] += _product(of_products, part, of_states.dtype)
                if of_part is not None:
                    _add_product(of_part, of_products.T, states[rows])
                if of_bias is not None:
                    of_bias[columns] += of_products.sum(0)
            if of_weight is not None and of_part is not None:
                of_weight[columns] = of_part
    if bias is not None and of_bias is not None:
        of_bias = of_bias.to(bias.dtype)
    return of_states[: len(hidden)].to(hidden.dtype), of_weight, of_bias


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


def _times(tile: Tensor, factor: Tensor | float) -> Tensor:
    """The tile times the factor, in place."""
    return tile if isinstance(factor, float) and factor == 1.0 else tile.mul_(factor)


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
