"""Causal attention of the last tokens of one sequence over the whole of it: full, or over a window or chunks; with
soft-capped scores and attention sinks.

Without these two it is PyTorch's SDPA, which has neither. With them scores are computed a part at a time, in the
forward pass and again in the backward pass, so that memory does not grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 64
"""The fewest queries that are computed together."""

PART_SCORES = 2**20
"""The most scores of all heads that are held at once, unless BLOCK queries have more: what stays in a CPU's cache."""


@dataclass(frozen=True)
class Sees:
    """What a token attends to: all before it and itself, the last `window` of these, or those in its `chunk`."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """How a layer's scores are computed: scale * q.k, soft-capped to cap * tanh(score / cap); `sinks` are one more
    score of each head, of a token whose value is zero. `scale` None is 1 / sqrt(dim).
    """

    scale: float | None = None
    cap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of the last tokens of a sequence over the whole of it, each made once for all layers."""

    device: torch.device
    made: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def get(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """[queries, keys], True where a query sees a key."""
        if (mask := self.made.get((queries, keys, window))) is None:
            mask = self.made[queries, keys, window] = self._make(queries, keys, window)
        return mask

    def _make(self, queries: int, keys: int, window: int | None) -> Tensor:
        if window is None and self.device.type == "cuda":
            return causal_lower_right(queries, keys)
        # On CPUs SDPA would make the same one in each call.
        return _visible(queries, keys, window, self.device)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return visible if window is None else visible.triu(keys - queries - window + 1)


def attend(
    query: Float[Tensor, "1 heads queries dim"],
    key: Float[Tensor, "1 heads keys dim"],
    value: Float[Tensor, "1 heads keys value_dim"],
    sees: Sees,
    scores: Scores,
    masks: Masks,
) -> Float[Tensor, "1 heads queries value_dim"]:
    """Attention of the last `queries` tokens of a sequence of `keys` tokens."""
    keys = key.shape[2]
    if sees.chunk is not None and sees.chunk < keys:
        return _attend_in_chunks(query, key, value, sees.chunk, scores, masks)
    window = None if sees.window is None or sees.window >= keys else sees.window
    if scores.cap is not None or scores.sinks is not None:
        scale = query.shape[3] ** -0.5 if scores.scale is None else scores.scale
        sinks = query.new_full([query.shape[1]], float("-inf")) if scores.sinks is None else scores.sinks
        explicit: Tensor = _Explicit.apply(query, key, value, sinks, (scale, scores.cap, window))
        return explicit
    if window is not None:
        return _attend_in_window(query, key, value, window, scores, masks)
    return _masked(query, key, value, None, scores, masks)


def _attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, chunk: int, scores: Scores, masks: Masks) -> Tensor:
    """Each chunk is a sequence of its own."""
    first = key.shape[2] - query.shape[2]  # position of the first query
    ends = [*range(chunk, key.shape[2], chunk), key.shape[2]]
    queries = query.split([end - start for start, end in pairwise([first, *(x for x in ends if x > first)])], dim=2)
    keys, values = (x.split([end - start for start, end in pairwise([0, *ends])], dim=2) for x in (key, value))
    parts = zip(queries, keys[-len(queries) :], values[-len(queries) :], strict=True)
    return torch.cat([attend(*part, Sees(), scores, masks) for part in parts], dim=2)


def _attend_in_window(query: Tensor, key: Tensor, value: Tensor, window: int, scores: Scores, masks: Masks) -> Tensor:
    """Blocks of queries half a window long, each over its own tokens and those blocks before it that it can see."""
    keys, first = key.shape[2], key.shape[2] - query.shape[2]
    block = max(BLOCK, window // 2)
    before = max(1, -(-(window - 1) // block))
    start = min(max(first, before * block), keys)  # of the first block; what lies before it is computed at once
    sizes = [block] * ((keys - start) // block) + [rest for rest in [(keys - start) % block] if rest]
    # Split, not sliced: the gradient of a slice is a tensor of the whole size, that of a split a part of one.
    head, *queries = query.split([start - first, *sizes], dim=2)
    (early_keys, _), (early_values, _) = (x.split([start, keys - start], dim=2) for x in (key, value))
    outputs = [_masked(head, early_keys, early_values, window, scores, masks)] if start > first else []
    if queries:
        pieces = [start - before * block, *[block] * before, *sizes]
        (_, *all_keys), (_, *all_values) = (x.split(pieces, dim=2) for x in (key, value))
        for i, block_queries in enumerate(queries):
            k, v = (torch.cat(x[i : i + before + 1], dim=2) for x in (all_keys, all_values))
            outputs.append(_masked(block_queries, k, v, window, scores, masks))
    return torch.cat(outputs, dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores, masks: Masks) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and window >= keys:
        window = None
    if window is None and queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale)
    mask = masks.get(queries, keys, window)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scale)


class _Context(Protocol):
    """What `_Explicit` keeps from its forward pass."""

    saved_tensors: tuple[Tensor, ...]
    settings: tuple[float, float | None, int | None]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Explicit(torch.autograd.Function):
    """Attention from scores that are computed part by part; softmax in fp32, products in the tensors' type.

    Keeps the result and, in fp32, the logarithm of each softmax's denominator, from which the backward pass has the
    probabilities again, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135).
    """

    @staticmethod
    def forward(
        ctx: _Context,
        query: Float[Tensor, "1 heads queries dim"],
        key: Float[Tensor, "1 heads keys dim"],
        value: Float[Tensor, "1 heads keys value_dim"],
        sinks: Float[Tensor, " heads"],
        settings: tuple[float, float | None, int | None],
    ) -> Float[Tensor, "1 heads queries value_dim"]:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        log_sums = query.new_empty(query.shape[:3], dtype=_exact(query))
        for rows, columns in _parts(query, key, settings[2]):
            scores = _hide_unseen(_scores(query, key, rows, columns, settings), settings[2])
            log_sum = torch.logaddexp(scores.logsumexp(3), sinks.to(scores.dtype)[:, None])
            log_sums[:, :, rows] = log_sum
            probabilities = scores.sub_(log_sum[..., None]).exp_().to(value.dtype)
            output[:, :, rows] = probabilities @ value[:, :, columns]
        ctx.save_for_backward(query, key, value, sinks, output, log_sums)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sums = ctx.saved_tensors
        scale, cap, window = ctx.settings
        of_query, kind = torch.empty_like(query), log_sums.dtype
        of_key, of_value = torch.zeros_like(key, dtype=kind), torch.zeros_like(value, dtype=kind)
        means = (grad.to(kind) * output.to(kind)).sum(3)  # of the gradients of a softmax's values, by its probabilities
        for rows, columns in _parts(query, key, window):
            scores = _scores(query, key, rows, columns, ctx.settings)
            slope = scale if cap is None else scores.square().mul_(-scale / cap**2).add_(scale)
            probabilities = _hide_unseen(scores, window).sub_(log_sums[:, :, rows, None]).exp_()
            of_value[:, :, columns] += probabilities.to(value.dtype).mT @ grad[:, :, rows]
            of_scores = (grad[:, :, rows] @ value[:, :, columns].mT).to(kind).sub_(means[:, :, rows, None])
            of_scores = of_scores.mul_(probabilities).mul_(slope).to(query.dtype)
            of_query[:, :, rows] = of_scores @ key[:, :, columns]
            of_key[:, :, columns] += of_scores.mT @ query[:, :, rows]
        of_sinks = -(torch.exp(sinks.to(kind)[:, None] - log_sums) * means).sum((0, 2))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_sinks.to(sinks.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    """The type of sums over `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Parts of the queries, and for each the keys that it can see."""
    (heads, queries), keys = query.shape[1:3], key.shape[2]
    first = keys - queries
    most = min(window or keys, keys)
    size = max(BLOCK, min(PART_SCORES // (heads * most), most // 2))
    for start in range(0, queries, size):
        end = min(start + size, queries)
        earliest = 0 if window is None else max(0, first + start - window + 1)
        yield slice(start, end), slice(earliest, first + end)


def _scores(
    query: Tensor, key: Tensor, rows: slice, columns: slice, settings: tuple[float, float | None, int | None]
) -> Float[Tensor, "1 heads rows columns"]:
    """Scores of some queries over some keys, whether they see them or not."""
    scale, cap, _ = settings
    scores = (query[:, :, rows] @ key[:, :, columns].mT).to(_exact(query)).mul_(scale)
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _hide_unseen(scores: Tensor, window: int | None) -> Tensor:
    """-inf where a query does not see a key; the last query's own key is the last one."""
    visible = _visible(scores.shape[2], scores.shape[3], window, scores.device)
    return scores.masked_fill_(~visible, float("-inf"))
