"""The head as a model has it: a bias, a scale and a cap of the logits, in the tiles and against models' own logits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from sampo_ray.errors import ConfigError
from sampo_ray.training import attention
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.batching import Pair, assemble
from sampo_ray.training.head import HeadSpec, TiledHead, decoder_of, head_of
from sampo_ray.training.logprobs import Distributions, LogitShape, Tile, token_comparisons, token_logprobs
from sampo_ray.training.policy import Policy, every_token, pair_divergences
from tests.conftest import random_pairs
from tests.test_method import Largest

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
GPT = {"vocab_size": 100, "n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}

shapes = st.builds(LogitShape, st.sampled_from([1.0, 0.0625, 3.0]), st.sampled_from([None, 0.5, 5.0, 1e6]))


def made(seed: int, tokens: int, dim: int, biased: bool, shape: LogitShape) -> Distributions:
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, dim, generator=rng, dtype=torch.float64) for n in (tokens, 50))
    bias = torch.randn(50, generator=rng, dtype=torch.float64) if biased else None
    return Distributions(hidden, weight, bias, shape)


def leaves(of: Distributions) -> Distributions:
    bias = None if of.bias is None else of.bias.clone().requires_grad_()
    return dataclasses.replace(
        of, hidden=of.hidden.clone().requires_grad_(), weight=of.weight.clone().requires_grad_(), bias=bias
    )


def log_softmax(of: Distributions) -> torch.Tensor:
    """As the definition says it."""
    logits = torch.nn.functional.linear(of.hidden, of.weight, of.bias) * of.shape.scale
    if of.shape.cap is not None:
        logits = of.shape.cap * torch.tanh(logits / of.shape.cap)
    return logits.log_softmax(-1)


def with_gradients(of: Distributions, values: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    (values * upstream).sum().backward()
    return [values, *(x.grad for x in (of.hidden, of.weight, of.bias) if x is not None)]


@given(st.integers(1, 60), st.booleans(), shapes, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_logprobs_and_gradients_with_bias_scale_and_cap_are_those_of_the_formula(tokens, biased, shape, seed):
    given = made(seed, tokens, 8, biased, shape)
    targets = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(seed))
    upstream = torch.randn(tokens, dtype=torch.float64)
    plain, tiled = leaves(given), leaves(given)
    expected = with_gradients(plain, log_softmax(plain).gather(1, targets[:, None])[:, 0], upstream)
    found = with_gradients(tiled, token_logprobs(tiled, targets, Tile(16, 20)), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@given(st.integers(1, 40), st.booleans(), st.booleans(), shapes, shapes, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_comparisons_of_two_heads_of_different_kinds_are_those_of_the_formulas(
    tokens, biased, reference_biased, shape, reference_shape, seed
):
    given = made(seed, tokens, 8, biased, shape)
    reference = made(seed + 1, tokens, 6, reference_biased, reference_shape)
    targets = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(seed))
    upstream = torch.randn(3, tokens, dtype=torch.float64)
    plain, tiled = leaves(given), leaves(given)
    ours, theirs = log_softmax(plain), log_softmax(reference)
    picked = [each.gather(1, targets[:, None])[:, 0] for each in (ours, theirs)]
    expected = with_gradients(plain, torch.stack([*picked, (theirs.exp() * (theirs - ours)).sum(-1)]), upstream)
    found = with_gradients(tiled, token_comparisons(tiled, reference, targets, Tile(16, 20)), upstream)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_a_capped_head_with_a_bias_diverges_from_itself_by_nothing():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=rng).bfloat16() for n in (30, 512))
    itself = Distributions(hidden, weight, torch.randn(512, generator=rng).bfloat16(), LogitShape(0.5, 10.0))
    targets = torch.randint(512, (30,), generator=rng)
    ours, theirs, divergences = token_comparisons(itself, itself, targets)
    assert torch.equal(ours, theirs) and torch.equal(ours, token_logprobs(itself, targets))
    assert not divergences.any()


def test_a_capped_head_with_a_bias_needs_no_more_than_a_tile_of_logits():
    rng = torch.Generator().manual_seed(0)
    tokens, words, tile = 600, 20_000, Tile(128, 1024)
    hidden, weight = (torch.randn(n, 16, generator=rng).bfloat16().requires_grad_() for n in (tokens, words))
    bias = torch.randn(words, generator=rng).bfloat16().requires_grad_()
    targets = torch.randint(words, (tokens,), generator=rng)
    with Largest() as largest:
        token_logprobs(Distributions(hidden, weight, bias, LogitShape(2.0, 30.0)), targets, tile).sum().backward()
    assert largest.numbers <= max(tile.tokens * tile.vocabulary, weight.numel())
    assert bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_part_of_the_head_gets_no_gradient_and_changes_none(frozen):
    rng = torch.Generator().manual_seed(0)
    targets, given = torch.randint(50, (20,), generator=rng), made(0, 20, 8, True, LogitShape(0.5, 3.0))
    whole, part = leaves(given), leaves(given)
    getattr(part, frozen).requires_grad_(False)
    for each in (whole, part):
        token_logprobs(each, targets, Tile(16, 20)).sum().backward()
    for name in ("hidden", "weight", "bias"):
        if name == frozen:
            assert getattr(part, name).grad is None
        else:
            assert torch.equal(getattr(part, name).grad, getattr(whole, name).grad)


FAMILIES = {
    "Bert": ({**SMALL, "is_decoder": True}, HeadSpec(("cls",), LogitShape(), None)),
    "CodeGen": ({**GPT, "n_ctx": 64}, HeadSpec((), LogitShape(), None)),
    "Cohere": ({**SMALL, "logit_scale": 0.3}, HeadSpec((), LogitShape(0.3), None)),
    "CTRL": ({**GPT, "dff": 48}, HeadSpec((), LogitShape(), None)),
    "FalconH1": (
        {**SMALL, "lm_head_multiplier": 0.7, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
        HeadSpec((), LogitShape(0.7), None),
    ),
    "Gemma2": ({**SMALL, "final_logit_softcapping": 2.0}, HeadSpec((), LogitShape(cap=2.0), None)),
    "Granite": ({**SMALL, "logits_scaling": 0.2}, HeadSpec((), LogitShape(5.0), None)),
    "HyperCLOVAX": ({**SMALL, "logits_scaling": 0.2}, HeadSpec((), LogitShape(0.2), None)),
    "Inkling": (
        {
            **SMALL,
            "unpadded_vocab_size": 90,
            "logits_mup_width_multiplier": 4.0,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        HeadSpec((), LogitShape(0.25), 90),
    ),
    "MiniCPM3": ({**SMALL, "dim_model_base": 8, "num_key_value_heads": 4}, HeadSpec((), LogitShape(0.25), None)),
    "ModernBertDecoder": (
        {**SMALL, "decoder_bias": True, **dict.fromkeys(SPECIAL_TOKENS, 1)},
        HeadSpec(("lm_head",), LogitShape(), None),
    ),
    "Mpt": (
        {"vocab_size": 100, "d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": 0.5},
        HeadSpec((), LogitShape(), None),
    ),
    "NanoChat": ({**SMALL, "final_logit_softcapping": 2.0}, HeadSpec((), LogitShape(cap=2.0), None)),
    "Phi": (SMALL, HeadSpec((), LogitShape(), None)),
    "RecurrentGemma": ({**SMALL, "logits_soft_cap": 2.0}, HeadSpec((), LogitShape(cap=2.0), None)),
    "Roberta": ({**SMALL, "is_decoder": True}, HeadSpec(("lm_head",), LogitShape(), None)),
    "xLSTM": (
        {"vocab_size": 100, "hidden_size": 64, "num_blocks": 2, "num_heads": 2, "output_logit_soft_cap": 2.0}
        | {"qk_dim_factor": 1.0},
        HeadSpec((), LogitShape(cap=2.0), None),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A random model of each kind of head, fp32, and what its head is."""
    fields, spec = FAMILIES[request.param]
    config = getattr(transformers, f"{request.param}{'Text' if request.param == 'Inkling' else ''}Config")(**fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3 if name.endswith("bias") else 0.05)
    return model, spec


def test_logprobs_and_gradients_are_those_of_the_model_s_own_forward(family):
    model, spec = family
    plain = copy.deepcopy(model)
    assert head_of(on_meta_like(model)) == spec
    tokens = torch.randint(5, 90, (1, 30), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(29, generator=torch.Generator().manual_seed(1))
    logprobs = plain(tokens).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
    (expected * upstream).sum().backward()

    head = TiledHead(model)
    model.set_output_embeddings(head)
    hidden = decoder_of(model)(input_ids=tokens).last_hidden_state[0, :-1]
    found = head(head.inputs(hidden), tokens[0, 1:])
    (found * upstream).sum().backward()

    assert torch.allclose(found, expected, atol=1e-5)
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == gradients.keys()
    largest = max(float(each.abs().max()) for each in gradients.values() if each is not None)
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (gradients[name] is None), name
        if weight.grad is not None:
            assert torch.allclose(weight.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest), name


def on_meta_like(model):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def test_a_check_changes_neither_the_model_nor_its_configuration(family):
    model, spec = family
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    modules, config = dict(model.named_modules()), model.config.to_dict()
    assert head_of(model) == spec
    assert modules == dict(model.named_modules()) and config == model.config.to_dict()
    for name, weight in model.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1])
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_a_large_model_is_checked_without_memory_for_it():
    large = {"vocab_size": 256_000, "hidden_size": 8192, "num_hidden_layers": 80, "logit_scale": 0.0625}
    model = on_meta(transformers.CohereConfig(**large))
    with Largest() as largest:
        assert head_of(model).shape == LogitShape(0.0625)
    assert largest.numbers < 1_000_000


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=out.logits * 2)


class Masked(LlamaForCausalLM):
    """One word can never be said."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=out.logits.index_fill(-1, torch.tensor([3]), -1e4))


class Shorter(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=out.logits[..., :-1])


class Demanding(LlamaForCausalLM):
    def forward(self, input_ids, pixels, **kwargs):
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Doubled, "they differ from those of its head by 5e-01 of the largest"),
        (Masked, "they differ from those of its head by"),
        (Shorter, r"of shape \[32, 23\] where the head's products are \[32, 24\]"),
        (Demanding, "cannot be computed.*pixels"),
    ],
)
def test_logits_that_are_made_in_an_unknown_way_are_refused(kind, words):
    with torch.device("meta"):
        model = kind(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ConfigError, match=rf"model\.path: {kind.__name__} has logits that .*{words}"):
        head_of(model)


def phi(seed: int) -> Policy:
    config = transformers.PhiConfig(**SMALL | {"vocab_size": 256})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    return Policy(model)


def test_tdpo_s_divergences_are_those_of_two_models_whose_heads_have_biases():
    policy, reference, pairs = phi(0), phi(1), random_pairs(4)
    naive = [log_softmax_of(each, pairs) for each in (policy, reference)]
    row = assemble(pairs)
    found = pair_divergences(policy, reference.distributions, row, every_token(pairs))
    sum(x.sum() for values in found[::2] for side in values for x in side).backward()
    assert policy.head.bias.grad.abs().max() > 0 and reference.head.bias.grad is None
    for i, pair in enumerate(pairs):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            ours, theirs = naive[0][i][side], naive[1][i][side]
            at = torch.from_numpy(answer).long()[:, None]
            expected = ours.gather(1, at)[:, 0], theirs.gather(1, at)[:, 0], (theirs.exp() * (theirs - ours)).sum(-1)
            for values, right in zip(found, expected, strict=True):
                assert torch.allclose(values[side][i], right, atol=1e-4)


@torch.no_grad()
def log_softmax_of(policy: Policy, pairs: list[Pair]) -> list[list[torch.Tensor]]:
    """Of each pair's answers by plain transformers: [tokens of the answer, vocabulary]."""
    config = copy.deepcopy(policy.model.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    plain.load_state_dict(policy.model.state_dict())
    found = []
    for pair in pairs:
        sides = [torch.from_numpy(np.concatenate([pair.prompt, x]))[None].long() for x in (pair.chosen, pair.rejected)]
        found.append([plain(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1) for ids in sides])
    return found
