"""Attention over rows of pairs: chosen and rejected share one prompt, pairs with the same prompt share it as well, and
otherwise the pairs of a row do not see each other.

Registered with transformers as `sampo_segments`; the row's layout travels as the keyword argument `row_layout`. Each
pair costs two calls, one causal over prompt and chosen, one of rejected over prompt and rejected. A call sees one pair
only, so on CPU its bits do not depend on what else is in the row.

On GPUs transformers' FlexAttention can do the same in one kernel for the whole row, with `block_mask`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sampo_ray.internals.torch import create_block_mask
from sampo_ray.training import cpu
from sampo_ray.training.batching import Segments

if TYPE_CHECKING:
    from jaxtyping import Float

# cuDNN's kernels make a plan for every new pair of lengths, and their backward pass is never deterministic.
torch.backends.cuda.enable_cudnn_sdp(False)

NAME = "sampo_segments"
FLEX = "flex_attention"  # PyTorch's FlexAttention (Dong et al. 2024, arXiv 2412.05496) in transformers


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where a row's pairs lie, and each one's mask of rejected over prompt and rejected, made once for all layers."""

    segments: tuple[Segments, ...]
    masks: tuple[Tensor, ...]

    @classmethod
    def of(cls, segments: tuple[Segments, ...], device: torch.device) -> RowLayout:
        def mask(pair: Segments) -> Tensor:
            if device.type == "cpu":  # where SDPA would make the same one in each call
                return torch.ones(pair.rejected, pair.prompt + pair.rejected, dtype=torch.bool).tril(pair.prompt)
            return causal_lower_right(pair.rejected, pair.prompt + pair.rejected)

        return cls(segments, tuple(map(mask, segments)))


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 key_heads tokens dim"],
    value: Float[Tensor, "1 key_heads tokens dim"],
    attention_mask: Tensor | None,
    *,
    row_layout: RowLayout,
    **settings: object,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """Attention of one row, [1, heads, tokens, dim] to [1, tokens, heads, dim]; tokens outside all segments get zeros.

    Raises ValueError for what it would silently get wrong: a mask, attention dropout, or a sliding window.
    """
    if attention_mask is not None or settings.get("dropout") or settings.get("sliding_window"):
        raise ValueError("segment attention takes no mask, no attention dropout and no sliding window")
    scale = settings.get("scaling")
    assert scale is None or isinstance(scale, float)
    dtype = query.dtype
    if cpu.wants_fp32(query):
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    return _attend(query, key, value, row_layout, scale).transpose(1, 2).to(dtype), None


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float | None) -> Tensor:
    """The two calls of each pair, put together: [1, heads, tokens, dim]."""
    # Split, not sliced: the gradient of a slice is a tensor of the whole row's size, that of a split a part of one.
    lengths, parts = _parts(layout.segments)
    fill = query.shape[2] - sum(lengths)
    queries, keys, values = (torch.split(x, [*lengths, fill], dim=2) for x in (query, key, value))
    outputs = []
    for pair, mask, (prompt, chosen, rejected) in zip(layout.segments, layout.masks, parts, strict=True):
        q, k, v = (torch.cat([x[prompt], x[chosen]], dim=2) for x in (queries, keys, values))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        # The outputs of a shared prompt are computed again and dropped: other calls than that of a pair alone may
        # round differently, and attention from a prompt costs little.
        outputs.append(output[:, :, pair.prompt :] if pair.shares_prompt else output)
        k, v = (torch.cat([x[prompt], x[rejected]], dim=2) for x in (keys, values))
        outputs.append(scaled_dot_product_attention(queries[rejected], k, v, attn_mask=mask, scale=scale))
    if fill:
        outputs.append(torch.zeros_like(values[-1]))  # as wide as the outputs
    return torch.cat(outputs, dim=2)


def _parts(segments: tuple[Segments, ...]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Lengths of the parts that a row consists of, and of each pair which are its prompt, chosen and rejected."""
    lengths, parts, prompts = list[int](), list[tuple[int, int, int]](), dict[int, int]()
    for pair in segments:
        if not pair.shares_prompt:
            prompts[pair.prompt_start] = len(lengths)
            lengths.append(pair.prompt)
        parts.append((prompts[pair.prompt_start], len(lengths), len(lengths) + 1))
        lengths += [pair.chosen, pair.rejected]
    return lengths, parts


def block_mask(segments: tuple[Segments, ...], tokens: int, device: torch.device) -> BlockMask:
    """What `segment_attention` lets each token of a row see, for FlexAttention; filler tokens see each other."""
    starts = torch.full((2, tokens), -1, dtype=torch.int32)
    prompt, response = starts  # of each token
    for each in segments:
        prompt[each.prompt_start :][: each.prompt] = each.prompt_start
        prompt[each.chosen_start : each.end] = each.prompt_start
        response[each.chosen_start : each.rejected_start] = each.chosen_start
        response[each.rejected_start : each.end] = each.rejected_start
    prompt, response = starts.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_response = (response[key] == -1) | (response[key] == response[query])
        seen: Tensor = (prompt[query] == prompt[key]) & (query >= key) & same_response
        return seen

    return create_block_mask(sees, tokens, device)


AttentionInterface.register(NAME, segment_attention)
