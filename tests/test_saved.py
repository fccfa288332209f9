"""What versions and exports hold: the tensors that `save_pretrained` writes, under the same names, to the bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from sampo_ray.internals.transformers import CheckpointFormat, checkpoint_name

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gemma3_text": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS,
    "phimoe": {"num_local_experts": 4},
    "deepseek_v2": {**ROUTED, **LATENT, "head_dim": None, "first_k_dense_replace": 1},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "apertus": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip
"""Families by kind of conversion: none, names, tied heads, experts, fused projections, buffers, parts kept in fp32."""


def small_model(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model whose buffers differ from what their class sets, loaded from its files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind]}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in dict(model.named_parameters()):
                tensor.copy_(torch.rand(tensor.shape))
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict(keep_vars=True).items()


def saved_by(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        name: (each.dtype, each.shape) for name, each in wanted.items()
    }
    assert [name for name, each in wanted.items() if not torch.equal(found[name], each)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_of_a_model_become_those_that_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    model = small_model(kind, tmp_path / "files")
    tensors = list(tensors_of(model))
    torch.manual_seed(1)
    order = torch.randperm(len(tensors)).tolist()
    streamed = CheckpointFormat(model, tensors).converted(tensors[index] for index in order)
    found = {name: tensor.clone() for name, tensor in streamed}
    assert_same(found, saved_by(model, tmp_path / "again"))
    names = {name: checkpoint_name(model, name) for name, _ in tensors}
    for name, tensor in tensors:
        if names[name] in found:
            assert torch.equal(found[names[name]], tensor)


def test_names_in_the_checkpoint_are_told_where_the_tensor_is_the_same(tmp_path: Path) -> None:
    pythia, mixtral = (small_model(kind, tmp_path / kind) for kind in ("gpt_neox", "mixtral"))
    assert checkpoint_name(pythia, "lm_head.weight") == "embed_out.weight"
    assert checkpoint_name(pythia, "gpt_neox.embed_in.weight") == "gpt_neox.embed_in.weight"
    layer = "model.layers.0"
    assert checkpoint_name(mixtral, f"{layer}.mlp.gate.weight") == f"{layer}.block_sparse_moe.gate.weight"
    assert checkpoint_name(mixtral, f"{layer}.mlp.experts.gate_up_proj") is None


def test_a_stream_that_lacks_a_tensor_is_an_error(tmp_path: Path) -> None:
    model = small_model("mixtral", tmp_path)
    some = list(tensors_of(model))[:-1]
    with pytest.raises(RuntimeError, match=r"no lm_head\.weight, nor 0 others"):
        list(CheckpointFormat(model, tensors_of(model)).converted(some))
