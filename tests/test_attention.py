"""Attention over rows of pairs is that of each answer behind its prompt alone, whatever its tokens may see."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from sampo_ray.config.sections import LoraConfig
from sampo_ray.training import attention
from sampo_ray.training.attention import RowLayout, RowMask, block_mask, over_row, segment_attention
from sampo_ray.training.batching import Row, assemble
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.sequence_attention import Scores, Sees
from tests.conftest import random_pairs

CPU = torch.device("cpu")


def visible(length: int, sees: Sees) -> Tensor:
    """[length, length] of one sequence."""
    at = torch.arange(length)
    seen = at[:, None] >= at
    if sees.window is not None:
        seen &= at[:, None] - at < sees.window
    return seen & (at[:, None] // sees.chunk == at // sees.chunk) if sees.chunk is not None else seen


def naive(row: Row, query: Tensor, key: Tensor, value: Tensor, sees: Sees, scores: Scores) -> Tensor:
    """Each sequence alone, from its whole matrix of scores; a prompt's tokens as in the first of its sequences."""
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for pair in row.segments:
        prompt = torch.arange(pair.prompt_start, pair.prompt_start + pair.prompt)
        for start, length in ((pair.chosen_start, pair.chosen), (pair.rejected_start, pair.rejected)):
            at = torch.cat([prompt, torch.arange(start, start + length)])
            logits = query[:, :, at] @ key[:, :, at].mT * (scores.scale or query.shape[3] ** -0.5)
            if scores.cap:
                logits = scores.cap * torch.tanh(logits / scores.cap)
            logits = logits.where(visible(len(at), sees), -torch.inf)
            if scores.sinks is not None:
                sinks = scores.sinks[None, :, None, None].expand(*logits.shape[:3], 1)
                logits = torch.cat([logits, sinks.to(logits)], dim=3)
            output[:, :, at] = logits.softmax(-1)[..., : len(at)] @ value[:, :, at]
    return output.transpose(1, 2)


def states(row: Row, heads: int = 2, dim: int = 8, value_dim: int = 8, seed: int = 0) -> list[Tensor]:
    """Query, key, value of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, len(row.tokens), width, generator=generator, dtype=torch.float64).requires_grad_()
        for width in (dim, dim, value_dim)
    ]


def ours(row: Row, query: Tensor, key: Tensor, value: Tensor, sees: Sees, **keywords: object) -> Tensor:
    mask = RowMask(RowLayout.of(row.segments, CPU), sees)
    return segment_attention(torch.nn.Module(), query, key, value, mask, **keywords)[0]


kinds = st.one_of(
    st.just(Sees()),
    st.integers(1, 200).map(lambda size: Sees(window=size)),
    st.integers(1, 200).map(lambda size: Sees(chunk=size)),
)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([20, 120]), kinds, st.booleans(), st.booleans())
@example(3, 2, 120, Sees(window=16), False, False)
@example(3, 2, 120, Sees(window=130), False, False)
@example(3, 2, 120, Sees(window=129), True, True)
@example(3, 2, 120, Sees(chunk=50), True, True)
@settings(max_examples=60)
def test_each_answer_sees_what_it_would_alone(count, prompts, longest, sees, capped, sunk):
    """Result and gradients, fp64, against whole matrices of scores."""
    row = assemble(random_pairs(count, seed=count, longest=longest, prompts=prompts))
    end = row.segments[-1].end
    inputs = states(row)
    scores = Scores(0.7, 1.5 if capped else None, torch.tensor([0.3, -1.0]).double() if sunk else None)
    inputs += [scores.sinks.requires_grad_()] if sunk else []
    expected = naive(row, *inputs[:3], sees, scores)[:, :end]
    found = ours(row, *inputs[:3], sees, scaling=0.7, softcap=scores.cap, s_aux=scores.sinks)[:, :end]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs, own = (torch.autograd.grad(x, inputs, weights) for x in (expected, found))
    torch.testing.assert_close(own, theirs)


@given(st.integers(1, 4), st.integers(1, 4), kinds)
@settings(max_examples=20)
def test_flex_attention_sees_what_the_calls_for_each_pair_see(count, prompts, sees):
    row = assemble(random_pairs(count, seed=count, longest=80, prompts=prompts))
    tokens, end = len(row.tokens), row.segments[-1].end
    mask, every = block_mask(RowLayout.of(row.segments, CPU), sees, tokens), torch.arange(tokens)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), every[:, None], every[None])
    assert mask.shape == (1, 1, tokens, tokens) and seen.any(1).all(), "an empty line would be no number"
    query, key, value = states(row)
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(ours(row, query, key, value, sees)[:, :end], theirs[:, :end])


def test_values_may_be_narrower_than_queries():
    row = assemble(random_pairs(2))
    fill = len(row.tokens) - row.segments[-1].end
    for keywords in ({}, {"softcap": 2.0}):
        out = ours(row, *states(row, value_dim=4), Sees(), **keywords)
        assert out.shape == (1, len(row.tokens), 2, 4) and fill and not out[:, -fill:].any()
        assert out.is_contiguous(), "some models view it in another shape"


def test_a_window_or_chunk_that_no_sequence_reaches_is_full_attention_to_the_bit():
    row = assemble(random_pairs(3, seed=1))
    length = max(pair.prompt + max(pair.chosen, pair.rejected) for pair in row.segments)
    inputs = [x.float() for x in states(row)]
    full, window, chunk = (ours(row, *inputs, sees) for sees in (Sees(), Sees(window=length), Sees(chunk=length)))
    assert torch.equal(full, window) and torch.equal(full, chunk)
    assert not torch.equal(full, ours(row, *inputs, Sees(window=length - 1)))


@pytest.mark.parametrize("capped", [False, True])
def test_the_bits_of_a_pair_do_not_depend_on_what_else_is_in_the_row(capped):
    pairs = random_pairs(3, seed=2, longest=200, prompts=2)
    row, last = assemble(pairs), assemble(pairs[2:])
    inputs = [x.float() for x in states(row)]
    at = row.segments[2]
    kept = torch.cat(
        [torch.arange(at.prompt_start, at.prompt_start + at.prompt), torch.arange(at.chosen_start, at.end)]
    )
    alone = [torch.nn.functional.pad(x[:, :, kept], (0, 0, 0, len(last.tokens) - len(kept))) for x in inputs]
    keywords = {"softcap": 2.0} if capped else {}
    both = (ours(row, *inputs, Sees(window=70), **keywords), ours(last, *alone, Sees(window=70), **keywords))
    assert torch.equal(both[0][:, at.chosen_start : at.end], both[1][:, at.prompt : len(kept)])


SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "full": LlamaConfig(**SIZES),
    "window": MistralConfig(**SIZES, sliding_window=24),
    "window, another family": Phi3Config(**SIZES, sliding_window=65),
    "window of some layers and soft-capping": Gemma2Config(
        **SIZES, sliding_window=24, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "window of some layers, other positions there": Gemma3TextConfig(
        **SIZES, sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "window of some layers, no positions elsewhere": Cohere2Config(
        **SIZES, sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "window of some layers and sinks": GptOssConfig(**SIZES, **EXPERTS, sliding_window=24),
    "chunks of some layers": Llama4TextConfig(
        **SIZES,
        **EXPERTS,
        intermediate_size_mlp=48,
        attention_chunk_size=24,
        no_rope_layers=[1, 1, 0, 1],
        attn_temperature_tuning=False,
    ),
}


def built(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """A model with random weights, the same for each attention, and scores that are large enough to matter."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (1.3 * weight.shape[-1] ** -0.5))
    return model.train()


def in_row(model: PreTrainedModel, row: Row) -> Tensor:
    with over_row(row.segments, CPU):
        inputs = {"input_ids": row.tokens[None], "attention_mask": torch.ones_like(row.tokens[None])}
        return model.model(**inputs, position_ids=row.positions[None], use_cache=False).last_hidden_state[0]


def in_sequences(row: Row, hidden: Tensor) -> list[Tensor]:
    """Of each sequence, the states that predict its answer, and that of its last token."""
    found = []
    for pair in row.segments:
        for start, length in ((pair.chosen_start, pair.chosen), (pair.rejected_start, pair.rejected)):
            last = pair.prompt_start + pair.prompt - 1
            found.append(torch.cat([hidden[last : last + 1], hidden[start : start + length]]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_transformers_does_with_each_sequence_alone(family):
    """fp32, states and gradients, at lengths beyond the window, with a prompt that two pairs share."""
    pairs = random_pairs(3, seed=4, longest=90, prompts=2)
    row = assemble(pairs)
    plain = built(FAMILIES[family], "eager")  # transformers' SDPA leaves out soft-capping
    expected = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]))[None].long()
            expected.append(plain.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(pair.prompt) - 1 :])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(each.shape, generator=generator) for each in expected]
    sum((each * weight).sum() for each, weight in zip(expected, weights, strict=True)).backward()

    model = built(FAMILIES[family], attention.NAME)
    found = in_sequences(row, in_row(model, row))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    sum((each * weight).sum() for each, weight in zip(found, weights, strict=True)).backward()
    for (name, theirs), own in zip(plain.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert (own.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, name


@pytest.mark.parametrize("family", [name for name in FAMILIES if "sinks" not in name])
def test_flex_attention_computes_what_the_calls_for_each_pair_do(family):
    """Forward only: FlexAttention has no backward pass on CPUs, and transformers leaves sinks to GPUs."""
    row = assemble(random_pairs(3, seed=4, longest=90, prompts=2))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling a kernel takes a minute
        both = [in_row(built(FAMILIES[family], kind).eval(), row) for kind in (attention.NAME, attention.FLEX)]
    torch.testing.assert_close(*(in_sequences(row, each) for each in both), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_masks_reach_the_layers_that_gradient_checkpointing_computes_again(lora):
    row = assemble(random_pairs(2, seed=5, longest=90))
    grads = []
    for checkpointing in (False, True):
        model = built(FAMILIES["window of some layers and soft-capping"], attention.NAME)
        if lora is not None:
            add_adapters(model, lora, seed=0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        in_row(model, row).square().mean().backward()
        grads.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    assert all(torch.equal(*both) for both in zip(*grads, strict=True)) and any(each.any() for each in grads[0])


@pytest.mark.parametrize("kind", [attention.NAME, attention.FLEX])
@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal=False"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1), "other": False}, "indices, other"),
    ],
)
def test_what_an_attention_does_not_know_is_refused(kind, keywords, named):
    row = assemble(random_pairs(1))
    layout = RowLayout.of(row.segments, CPU)
    segments = kind == attention.NAME
    mask = RowMask(layout, Sees()) if segments else block_mask(layout, Sees(), len(row.tokens))
    attend = segment_attention if segments else attention.flex_attention
    with pytest.raises(ValueError, match=f"Module asks for {named}$"):
        attend(torch.nn.Module(), *states(row), mask, **keywords)
    with pytest.raises(ValueError, match="the mask of Module is not that of the row"):
        attend(torch.nn.Module(), *states(row), None)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        inert = {"dropout": 0.0, "is_causal": True, "sliding_window": 3, "indices": None}
        attend(torch.nn.Module(), *(each.detach() for each in states(row)), mask, **inert)


def test_a_mask_of_another_kind_is_refused_by_the_layers_that_have_it():
    def mask(**asked: object) -> object:
        with over_row((), CPU):
            ones = torch.ones(1, 100, dtype=torch.bool)
            asked = {"batch_size": 1, "q_length": 100, "attention_mask": ones, "use_vmap": False, **asked}
            return attention.row_mask(lambda layout, sees, tokens: sees, **asked)

    assert mask(mask_function=lambda b, h, q, k: k <= q) == Sees()
    assert mask(mask_function=lambda b, h, q, k: (k <= q) & (k > q - 30), local_size=30) == Sees(window=30)
    assert mask(mask_function=lambda b, h, q, k: (k <= q) & (k // 30 == q // 30), local_size=30) == Sees(chunk=30)
    others = {
        "both ways": {"mask_function": lambda b, h, q, k: q >= 0},
        "a block that sees itself whole": {"mask_function": lambda b, h, q, k: (k <= q) | ((q < 9) & (k < 9))},
        "a window of another size": {
            "mask_function": lambda b, h, q, k: (k <= q) & (k > q - 29),
            "local_size": 30,
        },
        "no token at all": {"mask_function": lambda b, h, q, k: (k <= q) & (k > q), "local_size": 0},
        "made by a function of its own": {"mask_function": lambda b, h, q, k: k <= q, "use_vmap": True},
        "sequences found in the positions": {"mask_function": lambda b, h, q, k: k <= q, "attention_mask": None},
        "padding": {"mask_function": lambda b, h, q, k: k <= q, "attention_mask": torch.tensor([[0] + [1] * 99])},
    }
    for what, asked in others.items():
        assert isinstance(mask(**asked), attention.RefusedMask), what
