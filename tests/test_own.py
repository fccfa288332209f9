"""`model.attention: own`: answers behind prompts of their own, computed as transformers does for the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sampo_ray.config.rows import RowBudget
from sampo_ray.training.batching import Pair, assemble, padded_tokens, plan_rows, predecessors, split
from sampo_ray.training.noise import noise_in, silence, without_noise
from sampo_ray.training.policy import Policy, every_token, pair_logprobs
from sampo_ray.training.sequences import Sequences

from .conftest import random_pairs

SIZES = {
    **{"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0},
}
GPT_SIZES = {"vocab_size": 320, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gpt2": GPT_SIZES,
    "gptj": {**GPT_SIZES, "rotary_dim": 8},
    "ctrl": {**GPT_SIZES, "dff": 48},
    "gpt_neo": {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "falcon": {"alibi": True, "num_kv_heads": 4, "head_dim": None},
    "stablelm": {"use_qkv_bias": True, "hidden_size": 64},
    "xglm": {"d_model": 32, "attention_heads": 2, "num_layers": 2, "ffn_dim": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
    },
    "qwen3_next": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"mamba_n_heads": 6, "mamba_d_state": 16, "logits_scaling": 1.0},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 6, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "rwkv": {"attention_hidden_size": 48, "context_length": 128},
    "deepseek_v32": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "index_topk": 8,
        "index_n_heads": 2,
    },
}
"""Small models whose attention is not full causal attention alone, and three that others are compared with."""


def model_of(kind: str, **fields: object) -> PreTrainedModel:
    """A random fp32 model of this type, not in training, whose log-probs differ much from token to token."""
    sizes = GPT_SIZES if "n_embd" in FAMILIES[kind] else SIZES
    wanted = {**sizes, **FAMILIES[kind], **fields}
    config = CONFIG_MAPPING[kind](**{name: value for name, value in wanted.items() if value is not None})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=1.3 / weight.shape[-1] ** 0.5) if weight.ndim > 1 else weight.data.add_(0.1)
    return model


def plain_logprobs(model: PreTrainedModel, pair: Pair, answer: np.ndarray) -> Tensor:
    """Of an answer's tokens, by the model's own forward of the one sequence."""
    ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
    logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    return logprobs[len(pair.prompt) - 1 : -1].gather(1, ids[len(pair.prompt) :, None])[:, 0]


def by_sequence(model: PreTrainedModel, pairs: Sequence[Pair]) -> Tensor:
    return torch.cat([plain_logprobs(model, pair, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)])


def by_rows(policy: Policy, pairs: Sequence[Pair]) -> Tensor:
    chosen, rejected = pair_logprobs(policy, assemble(pairs), every_token(pairs))
    return torch.cat([each for both in zip(chosen, rejected, strict=True) for each in both])


def gradients(model: PreTrainedModel, logprobs: Tensor) -> Tensor:
    """Of all weights, for a weight of each log-prob that is its own."""
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_what_transformers_computes_for_each_sequence_alone(kind, batched):
    model, pairs = model_of(kind), random_pairs(5, longest=40, prompts=3)
    model.eval()
    expected = by_sequence(model, pairs)
    wanted = gradients(model, expected)
    assert expected.std() > 0.2
    found = by_rows(Policy(model, "own").in_batches(batched).train(), pairs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (gradients(model, found) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_computed_again_in_training_is_the_same(kind):
    model, pairs = model_of(kind), random_pairs(3, longest=20)
    silence(model)
    if not model.supports_gradient_checkpointing:
        pytest.skip("it keeps everything")
    policy = Policy(model, "own").train()
    wanted = gradients(model, by_rows(policy, pairs))
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    found = gradients(model, by_rows(policy.train(), pairs))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12)


@given(lengths, st.none() | st.integers(1, 60))
def test_each_answer_is_in_a_batch_once_behind_its_prompt(lengths, picked):
    made = [Pair(str(i), *(np.full(n, i * 3 + k, np.int32) for k, n in enumerate(of))) for i, of in enumerate(lengths)]
    row = assemble(made)
    sequences = Sequences.of(row.segments, len(row.tokens), picked=picked)
    alone = [len(batch) for batch in sequences.batches if picked is not None and batch.shape[1] > picked]
    assert set(alone) <= {1} and len(sequences.batches) <= len(alone) + 2
    found = [line.tolist() for batch in sequences.batches for line in row.tokens[batch]]
    expected = [[*pair.prompt, *answer] for pair in made for answer in (pair.chosen, pair.rejected)]
    assert len(found) == len(expected)
    for whole in expected:
        assert any(line[: len(whole)] == whole and set(line[len(whole) :]) <= {whole[-1]} for line in found)
    flat = torch.cat([batch.flatten() for batch in sequences.batches])
    answers = torch.cat([torch.arange(pair.chosen_start, pair.end) for pair in row.segments])
    assert torch.equal(flat[sequences.before[answers]], predecessors(row.segments, len(row.tokens))[answers])
    assert torch.equal(flat[sequences.before[answers] + 1], answers), "each from its own sequence"


@given(lengths, st.integers(1, 3), st.integers(30, 200))
def test_rows_of_padded_answers_hold_each_pair_once_and_stay_within_their_tokens(lengths, world, tokens):
    counts = np.array(lengths)
    rows = plan_rows(np.arange(len(counts)), counts, RowBudget(128, tokens, world, shared_prompts=False))
    assert sorted(np.concatenate(rows)) == list(range(len(counts))) and len(rows) % world == 0
    answers = counts[:, :1] + counts[:, 1:]
    assert all(len(row) <= 1 or padded_tokens(answers[row].ravel()) <= tokens for row in rows)


def test_frequencies_that_go_by_the_longest_sequence_are_those_of_each_alone():
    assert split(np.array([90, 80, 30, 20]), None) == 2
    assert split(np.array([90, 80, 79, 20]), 79) == 2
    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 32}
    model = model_of("llama", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, **factors})
    pairs = random_pairs(6, longest=40, seed=5)
    assert {len(pair.prompt) + len(pair.chosen) > 32 for pair in pairs} == {False, True}
    expected = by_sequence(model.eval(), pairs)
    torch.testing.assert_close(by_rows(Policy(model, "own").in_batches(True), pairs), expected, rtol=0, atol=1e-4)


NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT_SIZES, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"word_embed_proj_dim": 48, "ffn_dim": 64, "dropout": 0.5, "layerdrop": 0.5, "attention_dropout": 0.5},
    "xglm": {**FAMILIES["xglm"], "dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5},
    "seed_oss": {"attention_dropout": 0.5, "residual_dropout": 0.5},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "bloom": {**FAMILIES["bloom"], "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "layerdrop": 0.5},
}


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_has_none_of_the_noise_that_a_model_comes_with(kind, checkpointing):
    config, fields = CONFIG_MAPPING[kind], {**(GPT_SIZES if "n_embd" in NOISY[kind] else SIZES), **NOISY[kind]}
    model = AutoModelForCausalLM.from_config(config(**fields), dtype=torch.float32)  # its noise is as it comes
    pairs = random_pairs(3, longest=20)
    expected = by_sequence(model.eval(), pairs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    silence(model)
    found = by_rows(Policy(model, "own").train(), pairs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_noise_of_a_configuration_and_its_sections_is_found_and_left_out():
    config = CONFIG_MAPPING["dbrx"](resid_pdrop=0.1, attn_config={"attn_pdrop": 0.2})
    assert noise_in(config) == {"resid_pdrop": 0.1, "attn_config.attn_pdrop": 0.2}
    assert noise_in(without_noise(config)) == {} and config.resid_pdrop == 0.1, "what is published keeps it"
    assert without_noise(CONFIG_MAPPING["rwkv"]()).rescale_every == 0
