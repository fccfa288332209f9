"""Attention over rows of segments: chosen and rejected share one prompt, pairs with the same prompt share it, too, and
else pairs of a row never see each other.

Registered with transformers as `sampo_segments`; the row's segments travel as the keyword argument `segments`. Each
pair costs two calls, one causal over prompt and chosen, one of rejected over prompt and rejected. A call sees one pair
only, so on CPU its bits do not depend on what else is in the row.

On GPUs one kernel for the whole row, transformers' own FlexAttention, can do the same with `block_mask`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sampo_ray.training import cpu
from sampo_ray.training.batching import Segments

if TYPE_CHECKING:
    from jaxtyping import Float


# cuDNN's kernels make a plan for every new pair of lengths, and their backward pass is never deterministic.
torch.backends.cuda.enable_cudnn_sdp(False)

NAME = "sampo_segments"
FLEX = "flex_attention"
"""transformers' name for PyTorch's FlexAttention (Dong et al. 2024, arXiv 2412.05496)."""


def sight(segments: tuple[Segments, ...], device: torch.device) -> dict[str, Any]:
    """What `segment_attention` is told of a row, once for all layers.

    The masks are of rejected over prompt and rejected. (On CPUs SDPA would make the same ones, in each call.)
    """

    def mask(pair: Segments) -> Tensor:
        if device.type == "cpu":
            return torch.ones(pair.rejected, pair.prompt + pair.rejected, dtype=torch.bool).tril(pair.prompt)
        return causal_lower_right(pair.rejected, pair.prompt + pair.rejected)

    return {"segments": segments, "masks": tuple(map(mask, segments))}


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 key_heads tokens dim"],
    value: Float[Tensor, "1 key_heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: tuple[Segments, ...],
    masks: tuple[Tensor, ...],
    **kwargs: object,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """Attention of one row, [1, heads, tokens, dim] to [1, tokens, heads, dim]; tokens outside all segments get zeros.
    `segments` and `masks` are those of `sight`.

    Raises ValueError for what it would silently get wrong: a mask, attention dropout, or a sliding window.
    """
    if attention_mask is not None or dropout or kwargs.get("sliding_window"):
        raise ValueError("segment attention takes no mask, no attention dropout and no sliding window")
    dtype = query.dtype
    if cpu.wants_fp32(query):
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    # Split, not sliced: the gradient of a slice is a tensor of the whole row's size, that of a split a part of one.
    lengths = list[int]()
    parts = []  # of each pair, which are its prompt, chosen and rejected
    prompts = dict[int, int]()
    for pair in segments:
        if not pair.shares_prompt:
            prompts[pair.prompt_start] = len(lengths)
            lengths.append(pair.prompt)
        parts.append((prompts[pair.prompt_start], len(lengths), len(lengths) + 1))
        lengths += [pair.chosen, pair.rejected]
    fill = query.shape[2] - sum(lengths)
    queries, keys, values = (x.split([*lengths, fill], dim=2) for x in (query, key, value))
    outputs = []
    for pair, mask, (prompt, chosen, rejected) in zip(segments, masks, parts, strict=True):
        q, k, v = (torch.cat([x[prompt], x[chosen]], dim=2) for x in (queries, keys, values))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        # A shared prompt is looked from once more, and that dropped: other calls than that of a pair alone round as
        # they like, and attention from a prompt is the least of its costs.
        outputs.append(seen[:, :, pair.prompt :] if pair.shares_prompt else seen)
        k, v = (torch.cat([x[prompt], x[rejected]], dim=2) for x in (keys, values))
        outputs.append(scaled_dot_product_attention(queries[rejected], k, v, attn_mask=mask, scale=scaling))
    if fill:
        outputs.append(torch.zeros_like(values[-1]))  # of the outputs' width
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


def allow_flex_shapes() -> None:
    """As many compiled kernels of FlexAttention as rows, scoring and adapters need. More are an error: where none is
    compiled it makes whole matrices of scores.
    """
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def block_mask(segments: tuple[Segments, ...], tokens: int, device: torch.device) -> BlockMask:
    """Which tokens of a row each of its tokens sees, for FlexAttention: the same as in `segment_attention`; the filler
    sees itself.
    """
    begins = torch.full((2, tokens), -1, dtype=torch.int32)
    prompt, response = begins  # of each token
    for each in segments:
        prompt[each.prompt_start :][: each.prompt] = each.prompt_start
        prompt[each.chosen_start : each.end] = each.prompt_start
        response[each.chosen_start : each.rejected_start] = each.chosen_start
        response[each.rejected_start : each.end] = each.rejected_start
    prompt, response = begins.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        along = (response[key] == -1) | (response[key] == response[query])
        return (prompt[query] == prompt[key]) & (query >= key) & along

    compiled = device.type != "cpu"  # else there is a whole mask in between
    return create_block_mask(sees, None, None, tokens, tokens, device=device, _compile=compiled)


AttentionInterface.register(NAME, segment_attention)
