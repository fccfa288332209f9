"""Attention over rows of pairs: chosen and rejected share one prompt, pairs with the same prompt share it as well, and
otherwise the pairs of a row do not see each other.

Registered with transformers as `sampo_segments`. Each pair costs two calls, one causal over prompt and chosen, one of
rejected over prompt and rejected. A call sees one pair only, so on CPU its bits do not depend on what else is in the
row. On GPUs transformers' FlexAttention can do the same in one kernel for the whole row: `sampo_flex`.

Which tokens each layer sees is for the model's own code to say: it makes its masks through transformers, which calls
the functions registered here for it. They return what it asks for, over the row that is given by `over_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward

from sampo_ray.internals.torch import create_block_mask
from sampo_ray.training import cpu
from sampo_ray.training.batching import Segments
from sampo_ray.training.sequence_attention import Masks, Scores, Sees, attend

if TYPE_CHECKING:
    from jaxtyping import Float

# cuDNN's kernels make a plan for every new pair of lengths, and their backward pass is never deterministic.
torch.backends.cuda.enable_cudnn_sdp(False)

NAME = "sampo_segments"
FLEX = "sampo_flex"  # PyTorch's FlexAttention (Dong et al. 2024, arXiv 2412.05496) in transformers

INERT = frozenset(
    {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "sliding_window", "use_cache"}
)
"""Arguments that layers hand to any attention and that change nothing here: the mask has said what a token sees."""


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where a row's pairs lie, and the masks that its calls need."""

    segments: tuple[Segments, ...]
    masks: Masks

    @classmethod
    def of(cls, segments: tuple[Segments, ...], device: torch.device) -> RowLayout:
        return cls(segments, Masks(device))


@dataclass(frozen=True, eq=False)
class RowMask:
    """What layers get as their attention mask: which tokens of a row each token sees."""

    layout: RowLayout
    sees: Sees


@dataclass(frozen=True)
class RefusedMask:
    """In place of a mask that rows of pairs cannot have. Models make masks of kinds that none of their layers has."""

    reason: str


_row: ContextVar[RowLayout] = ContextVar("row")


@contextmanager
def over_row(segments: tuple[Segments, ...], device: torch.device) -> Iterator[None]:
    """Within, masks that models make are of a row of these pairs."""
    token = _row.set(RowLayout.of(segments, device))
    try:
        yield
    finally:
        _row.reset(token)


def row_mask(
    make: Callable[[RowLayout, Sees, int], RowMask | BlockMask],
    /,
    *,
    q_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: object,  # what a dense matrix would need
) -> RowMask | BlockMask | RefusedMask:
    """Called by transformers, in place of its own functions, when a model makes the mask of its layers.

    Refused if its `mask_function` lets a token see anything but what `Sees` can say.
    A 2-D mask of ones has to reach it: without one transformers looks for sequences in the positions of the row.
    """
    if attention_mask is None or use_vmap or not attention_mask.all():
        return RefusedMask("is one of its own")
    size = local_size or q_length
    near = {edge + step for edge in (0, size, 2 * size, q_length) for step in (-2, -1, 0, 1)}
    places = torch.tensor(sorted({*near, *range(0, q_length, -(-q_length // 32))} & {*range(q_length)}))
    places = places.to(attention_mask.device)
    queries, keys = places[:, None], places[None]
    zero, causal = torch.zeros_like(places[:1]), queries >= keys
    visible = mask_function(zero, zero, queries, keys)
    for sees, expected in (
        (Sees(), causal),
        (Sees(window=local_size), causal & (queries - keys < size)),
        (Sees(chunk=local_size), causal & (queries // size == keys // size)),
    ):
        if torch.equal(visible.broadcast_to(expected.shape), expected):
            return make(_row.get(), sees, q_length)
    return RefusedMask("is neither causal, nor a window, nor chunks")


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 key_heads tokens dim"],
    value: Float[Tensor, "1 key_heads tokens value_dim"],
    attention_mask: RowMask,
    **settings: object,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Attention of one row, [1, heads, tokens, dim] to [1, tokens, heads, dim]; tokens outside all segments get zeros.

    ValueError for what it would silently get wrong: another mask, or a setting that it does not know.
    """
    _check_mask(module, attention_mask, RowMask)
    scores = _scores(module, settings)
    dtype = query.dtype
    if cpu.wants_fp32(query):
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    output = _attend(query, key, value, attention_mask, scores)
    return output.transpose(1, 2).to(dtype).contiguous(), None


def flex_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 key_heads tokens dim"],
    value: Float[Tensor, "1 key_heads tokens value_dim"],
    attention_mask: BlockMask,
    **settings: object,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], Tensor | None]:
    """As `segment_attention`, by transformers' FlexAttention; tokens outside all segments see each other."""
    _check_mask(module, attention_mask, BlockMask)
    scores = _scores(module, settings)
    output: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query, key, value, attention_mask, scaling=scores.scale, softcap=scores.cap, s_aux=scores.sinks
    )
    return output


def _check_mask(module: torch.nn.Module, mask: object, kind: type[RowMask | BlockMask]) -> None:
    if not isinstance(mask, kind):
        reason = mask.reason if isinstance(mask, RefusedMask) else "is not that of the row"
        raise ValueError(f"attention over rows of pairs: the mask of {type(module).__name__} {reason}")


def _scores(module: torch.nn.Module, settings: dict[str, object]) -> Scores:
    """Scale, soft-capping and sinks, as transformers names them. ValueError for settings that may change more."""
    scale, cap, sinks = (settings.pop(name, None) for name in ("scaling", "softcap", "s_aux"))
    assert isinstance(scale, float | int | None) and isinstance(cap, float | int | None)
    assert isinstance(sinks, Tensor | None)
    unknown = {name for name, value in settings.items() if name not in INERT and value is not None}
    if not settings.get("dropout"):
        unknown.discard("dropout")
    causal = settings.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        unknown.add("is_causal=False")
    if unknown:
        layer = type(module).__name__
        raise ValueError(f"attention over rows of pairs: {layer} asks for {', '.join(sorted(unknown))}")
    return Scores(scale, cap, sinks)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: RowMask, scores: Scores) -> Tensor:
    """The two calls of each pair, put together: [1, heads, tokens, dim]."""
    # Split, not sliced: the gradient of a slice is a tensor of the whole row's size, that of a split a part of one.
    lengths, parts = _parts(mask.layout.segments)
    fill = query.shape[2] - sum(lengths)
    queries, keys, values = (torch.split(x, [*lengths, fill], dim=2) for x in (query, key, value))
    outputs = []
    for pair, (prompt, chosen, rejected) in zip(mask.layout.segments, parts, strict=True):
        q, k, v = (torch.cat([x[prompt], x[chosen]], dim=2) for x in (queries, keys, values))
        output = attend(q, k, v, mask.sees, scores, mask.layout.masks)
        # The outputs of a shared prompt are computed again and dropped: other calls than that of a pair alone may
        # round differently, and attention from a prompt costs little.
        outputs.append(output[:, :, pair.prompt :] if pair.shares_prompt else output)
        k, v = (torch.cat([x[prompt], x[rejected]], dim=2) for x in (keys, values))
        outputs.append(attend(queries[rejected], k, v, mask.sees, scores, mask.layout.masks))
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


def block_mask(layout: RowLayout, seen: Sees, tokens: int) -> BlockMask:
    """What `segment_attention` lets each token of a row see, for FlexAttention; filler tokens see each other."""
    marks = torch.full((3, tokens), -1, dtype=torch.int32)
    prompt, response, place = marks  # of each token
    for each in layout.segments:
        prompt[each.prompt_start :][: each.prompt] = each.prompt_start
        prompt[each.chosen_start : each.end] = each.prompt_start
        response[each.chosen_start : each.rejected_start] = each.chosen_start
        response[each.rejected_start : each.end] = each.rejected_start
        for start, length in ((each.chosen_start, each.chosen), (each.rejected_start, each.rejected)):
            place[start : start + length] = torch.arange(each.prompt, each.prompt + length)
        place[each.prompt_start :][: each.prompt] = torch.arange(each.prompt)
    prompt, response, place = marks.to(layout.masks.device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_response = (response[key] == -1) | (response[key] == response[query])
        visible: Tensor = (prompt[query] == prompt[key]) & (query >= key) & same_response
        if seen.window is not None:
            visible = visible & (place[query] - place[key] < seen.window)
        if seen.chunk is not None:
            visible = visible & (place[query] // seen.chunk == place[key] // seen.chunk)
        return visible

    return create_block_mask(sees, tokens, layout.masks.device)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, partial(row_mask, lambda layout, sees, _: RowMask(layout, sees)))
AttentionInterface.register(FLEX, flex_attention)
AttentionMaskInterface.register(FLEX, partial(row_mask, block_mask))
