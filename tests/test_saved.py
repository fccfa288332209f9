"""What versions and exports hold: the tensors that `save_pretrained` writes, under the same names, to the bit."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from sampo_ray.errors import ConfigError, OverflowingWeightsError
from sampo_ray.internals.transformers import CheckpointFormat, checkpoint_name, saved_tensors
from sampo_ray.training.loading import in_training_dtype, load_model
from sampo_ray.training.saving import Cast

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
    "youtu": {**LATENT, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip
"""Families by kind of conversion: none, names, tied heads, experts, fused projections, buffers, parts kept in fp32."""


def small_files(kind: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    """The folder, with a random model; what is one number everywhere, as biases are, gets other values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **KINDS.get(kind, {}), **changes}))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.unique().numel() == 1:
                tensor.copy_(torch.rand(tensor.shape))
    model.save_pretrained(folder)
    return folder


def small_model(kind: str, folder: Path, **changes: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(small_files(kind, folder, **changes), dtype=torch.bfloat16)


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


@pytest.mark.parametrize("kind", ["youtu", "zaya", "llama"])
def test_a_model_is_loaded_as_its_files_have_it(kind: str, tmp_path: Path) -> None:
    model = small_model(kind, tmp_path, pad_token_id=3)
    tensors = {name: torch.rand(each.shape) for name, each in saved_by(model, tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert_same({name: each.float() for name, each in saved_tensors(loaded)}, tensors)


@pytest.mark.parametrize(("kind", "lost"), [("apertus", "act_fn.beta"), ("glm4_moe", "gate.weight")])
def test_a_model_without_all_of_its_tensors_is_refused(kind: str, lost: str, tmp_path: Path) -> None:
    tensors = saved_by(small_model(kind, tmp_path), tmp_path)
    (name,) = [name for name in tensors if name.endswith(lost)][:1]
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"^model\.path=.*: has no weights for {name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe", "ernie4_5_moe", "gpt_neox", "llama"])
def test_a_version_in_memory_makes_the_model_that_its_files_make(kind: str, tmp_path: Path) -> None:
    first = small_model(kind, tmp_path)
    tensors = {name: each + 1 for name, each in saved_tensors(first)}
    loaded = load_model(tmp_path, tensors=tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(loaded.state_dict(), load_model(tmp_path).state_dict())


def test_what_is_kept_in_fp32_is_computed_in_bf16_where_it_is_trained_and_as_it_is_where_not(tmp_path: Path) -> None:
    model = load_model(small_files("ernie4_5_moe", tmp_path))
    gate = model.model.layers[1].mlp.gate
    weight, bias = gate.weight.detach().clone(), gate.moe_statics.e_score_correction_bias.detach().clone()
    assert weight.dtype == bias.dtype == torch.float32
    names = {name: each.shape for name, each in saved_tensors(model)}
    in_training_dtype(model)
    assert all(each.dtype == torch.bfloat16 for each in model.parameters())
    assert torch.equal(gate.weight, weight.bfloat16())
    assert torch.equal(gate.moe_statics.e_score_correction_bias, bias) and not torch.equal(
        bias, bias.bfloat16().float()
    )
    assert {name: each.shape for name, each in saved_tensors(model)} == names
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_values_beyond_float16_are_counted_and_refused_with_what_to_do() -> None:
    cast, weight = Cast(torch.float16), torch.tensor([7e4, -1e5, 6e4, -math.inf])
    assert cast("a.weight", torch.ones(2)).dtype == torch.float16
    cast.check()
    assert cast("kept", weight, torch.float32).isfinite().sum() == 3
    cast.check()
    cast("b.weight", weight)
    cast("c.weight", weight)
    with pytest.raises(
        OverflowingWeightsError, match=r"float16 cannot hold 4 .* in b\.weight\); set run\.export_dtype=bfloat16"
    ):
        cast.check()
