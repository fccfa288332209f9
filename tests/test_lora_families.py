"""LoRA on models of different kinds: what is adapted, and that what is published is what was trained."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sampo_ray.actors.policy.replica_weights import check_belongs, merging
from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import ConfigError, WeightsError
from sampo_ray.run.adapters import SETTINGS, WEIGHTS, read_adapter
from sampo_ray.run.buckets import pack, unpack
from sampo_ray.run.version_files import adapters_info, read_version, write_adapters
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training import lora
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.batching import assemble
from sampo_ray.training.lora import (
    MATRICES,
    adapter_names,
    add_adapters,
    file_name,
    named_weights,
    notes_on,
    without_adapters,
)
from sampo_ray.training.policy import Policy, every_token, pair_logprobs
from tests.conftest import random_pairs

IDS = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
INDEXED = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "num_key_value_heads": 4}
DBRX = {
    **{"vocab_size": 320, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
}
ATTENTION, DENSE, STACKS = "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj", "down_proj gate_up_proj"
LATENTS = "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"
NEOX = "dense dense_4h_to_h dense_h_to_4h query_key_value"


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model; `linear` are the ends of the names of what `all-linear` adapts, `stacks` and `routers` of what can
    be adapted besides. `alone`: whether adapters on `linear` are published without their model. `bits`: whether frozen
    weights are computed with as trained ones are; torch.matmul of strided inputs, as Mamba has them, chooses its kernel
    by what needs a gradient, and some CPUs round otherwise in one of them."""

    kind: str
    config: dict[str, Any]
    linear: str
    stacks: str = ""
    routers: str = ""
    alone: bool = True
    bits: bool = True

    def assert_same(self, ours: Any, theirs: Any) -> None:
        """Tensors, or dictionaries of them."""
        exactly = {"rtol": 0.0, "atol": 0.0}
        assert_close(ours, theirs, **(exactly if self.bits else {"rtol": 1e-4, "atol": 1e-5}))

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """With weights random enough that each changes the logits."""
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **self.config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "A_log" not in name:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            model.get_input_embeddings().weight.normal_()
        return model.to(dtype).eval()


FAMILIES = [
    Family("llama", {**GROUPED, "tie_word_embeddings": True}, f"{ATTENTION} {DENSE}"),
    Family("phi3", {**GROUPED, "pad_token_id": 0}, "down_proj gate_up_proj o_proj qkv_proj"),
    Family("gpt_neox", SIZES, NEOX),
    Family("gpt2", {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}, "c_attn c_fc c_proj", alone=False),
    Family("bloom", {**SIZES, "n_head": 4, "n_layer": 2}, NEOX),
    Family("mamba", {**SIZES, "state_size": 4}, "dt_proj in_proj out_proj x_proj", bits=False),
    Family("hrm_text", GROUPED, f"{ATTENTION} {DENSE}", alone=False),
    Family("hy_v3", {**GROUPED, **EXPERTS}, f"{ATTENTION} {DENSE}", STACKS),
    Family("mixtral", {**GROUPED, "num_local_experts": 4}, ATTENTION, STACKS),
    Family("qwen3_moe", {**GROUPED, **EXPERTS, "mlp_only_layers": [0]}, f"{ATTENTION} {DENSE}", STACKS),
    Family("qwen2_moe", {**GROUPED, **SHARED}, f"{ATTENTION} {DENSE}", STACKS, "shared_expert_gate"),
    Family("deepseek_v3", {**SIZES, **DEEPSEEK}, f"{LATENTS} {DENSE}", STACKS),
    Family("deepseek_v32", {**SIZES, **DEEPSEEK, **INDEXED}, f"{LATENTS} {DENSE}", STACKS),
    Family("ernie4_5_moe", {**GROUPED, **EXPERTS, "moe_num_experts": 4}, f"{ATTENTION} {DENSE}", STACKS),
    Family("gpt_oss", {**GROUPED, "num_local_experts": 4}, ATTENTION, STACKS),
    Family("jetmoe", {**GROUPED, "kv_channels": 8}, "kv_proj", "input_linear output_linear", "layer"),
    Family("dbrx", DBRX, "Wqkv out_proj", "", "layer"),
]
BY_KIND = {family.kind: family for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
NAMED = [family for family in FAMILIES if family.stacks or family.routers]


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def ends(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


def adapt(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Gives it adapters that are no longer at their start."""
    add_adapters(model, LoraConfig(rank=3, **settings), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def adapted_weights(model: nn.Module) -> set[str]:
    return {name for name, weight in named_weights(model) if weight.adapter}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.merged(lambda part: part.data) for name, weight in named_weights(model)}


def check(family: Family, **settings: Any) -> set[str]:
    """Adapters begin at the reference, all get gradients, and the merged weights are the adapted model; returns the
    ends of the names of the adapted weights."""
    plain, adapted = family.build(), family.build()
    names, begin = sorted(name for name, _ in named_weights(plain)), logits(plain).detach()
    add_adapters(adapted, LoraConfig(rank=3, **settings), seed=1)
    family.assert_same(logits(adapted), begin)
    logits(adapted).log_softmax(-1)[..., 7].sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and not [
        n for n, each in trained.items() if "lora_B" in n and (each.grad is None or not each.grad.any())
    ]
    adapted = adapt(family.build(), **settings)
    with torch.no_grad():
        moved = float((logits(adapted) - begin).abs().max())
        assert moved > 0.01
        with without_adapters(adapted):
            family.assert_same(logits(adapted), begin)
        merged = merged_weights(adapted)
        assert sorted(merged) == names
        plain.load_state_dict(merged, strict=False)
        assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4 * max(1.0, moved))
    return ends(adapted_weights(adapted))


@each_family
def test_all_linear_adapts_linear_layers_and_no_others_and_says_so(family):
    assert check(family) == set(family.linear.split())
    config = LoraConfig(rank=3)
    notes = " ".join(notes_on(on_meta(AutoConfig.for_model(family.kind, **family.config), config), config))
    named = [*family.stacks.split(), *family.routers.split()]
    assert all(name in notes for name in named) and ("does not adapt" in notes) == bool(named)


@pytest.mark.parametrize("family", NAMED, ids=lambda family: family.kind)
def test_experts_and_routers_are_adapted_when_they_are_named(family):
    targets = tuple(f"{family.stacks} {family.routers}".split())
    assert check(family, targets=targets) == set(targets)


def test_the_experts_alone_are_adapted_by_a_longer_name():
    model = adapt(BY_KIND["qwen3_moe"].build(), targets=("experts.down_proj",))
    assert adapted_weights(model) == {"model.layers.1.mlp.experts.down_proj"}
    model = adapt(BY_KIND["qwen3_moe"].build(), targets=("layers.0.mlp.down_proj", "q_proj"))
    assert adapted_weights(model) == {
        "model.layers.0.mlp.down_proj.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)),
    }


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What its checkpoint holds."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@each_family
def test_adapters_alone_make_the_merged_weights_to_the_bit_or_are_not_published(family, tmp_path):
    model, plain, lora = adapt(family.build(torch.bfloat16)), family.build(torch.bfloat16), LoraConfig(rank=3)
    names = adapter_names(model)
    assert (names is not None) == family.alone
    if names is None:
        return
    parts = {name: weight.parts[1:] for name, weight in named_weights(model) if weight.adapter}
    info = VersionInfo(version=4, round=0, step=4, adapters=adapters_info(lora, 0))
    adapted = [
        (file_name(names[name], side), part)
        for name, each in parts.items()
        for side, part in zip(MATRICES, each, strict=True)
    ]
    write_adapters(str(tmp_path / "4"), adapted, lora, info)
    (adapters,) = read_version(str(tmp_path / "4"))
    base = saved(plain, tmp_path / "base")
    plain.load_state_dict(merged_weights(model), strict=False)
    expected = saved(plain, tmp_path / "merged")
    merge, buckets = merging(adapters, adapters_info(lora, 0).scaling), list(pack(base.items(), 1 << 30))
    check_belongs(adapters, buckets)
    found = {name: tensor for bucket in buckets for name, tensor in unpack(merge(bucket))}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(not torch.equal(found[name], base[name]) for name in base) == len(parts)
    with pytest.raises(WeightsError, match="adapters are on no weight of their base version"):
        check_belongs(adapters, pack({"other": base.popitem()[1]}.items(), 1 << 30))


@pytest.mark.parametrize(
    ("kind", "targets"), [("mixtral", STACKS), ("jetmoe", "layer"), ("qwen2_moe", "shared_expert_gate q_proj")]
)
def test_adapters_on_experts_and_routers_are_not_published_alone(kind, targets):
    config = LoraConfig(rank=3, targets=tuple(targets.split()))
    model = on_meta(AutoConfig.for_model(kind, **BY_KIND[kind].config), config)
    assert adapter_names(model) is None and "whole versions" in notes_on(model, config)[-1]


@pytest.mark.parametrize(
    ("kind", "target", "has"),
    [
        ("llama", "query", "q_proj"),
        ("llama", "lm_head", "q_proj"),
        ("gpt_neox", "embed_out", "query_key_value"),
        ("mixtral", "gate", "down_proj, gate_up_proj"),
        ("deepseek_v32", "indexer.wk", "kv_b_proj"),
        ("dbrx", "w1", "Wqkv"),
    ],
)
def test_a_name_of_nothing_that_can_be_adapted_is_refused(kind, target, has):
    with pytest.raises(
        ConfigError, match=rf"model\.lora\.targets: '{target}' names no linear layer or experts .*{has}"
    ):
        on_meta(AutoConfig.for_model(kind, **BY_KIND[kind].config), LoraConfig(rank=3, targets=(target,)))


def test_layers_that_share_a_weight_are_not_adapted():
    model = BY_KIND["llama"].build()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    second.down_proj = first.down_proj
    adapted = adapted_weights(adapt(model))
    assert len(adapted) == 10 and ends(adapted) == set(f"{ATTENTION} gate_proj".split())


def test_a_model_without_linear_layers_is_refused(monkeypatch):
    monkeypatch.setattr(lora, "adaptable_layers", lambda model: {})
    with pytest.raises(ConfigError, match="has no linear layer to adapt, but down_proj, gate_up_proj; name that"):
        adapt(BY_KIND["mixtral"].build())


def test_an_error_of_pefts_names_the_field(monkeypatch):
    def refuse(*arguments: object, **settings: object) -> None:
        raise NotImplementedError("layers like these are not supported\nat all")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    with pytest.raises(
        ConfigError, match=r"model\.lora\.targets: peft gives Llama.* \(layers like these are not supported\)"
    ):
        adapt(BY_KIND["llama"].build(), targets=("q_proj",))


def test_it_is_noticed_when_peft_adapts_other_layers_than_those_asked_for(monkeypatch):
    inject = peft.inject_adapter_in_model

    def less(config: object, model: object, name: str, state_dict: dict[str, object]) -> None:
        inject(config, model, name, state_dict=dict(list(state_dict.items())[1:]))

    monkeypatch.setattr(peft, "inject_adapter_in_model", less)
    with pytest.raises(ConfigError, match=r"peft adapts other weights than those asked for \(q_proj\)"):
        adapt(BY_KIND["llama"].build(), targets=("q_proj",))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "mamba"])
def test_gradients_are_the_same_when_layers_are_computed_again(kind, reentrant):
    family = BY_KIND[kind]
    targets = tuple(f"{family.linear} {family.stacks}".split())

    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        logits(model).log_softmax(-1)[..., 7].sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}

    expected, again = adapt(family.build(), targets=targets), adapt(family.build(), targets=targets)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    family.assert_same(gradients(again.train()), gradients(expected.train()))


@pytest.mark.parametrize("kind", ["mamba", "gpt_oss", "bloom", "qwen2_moe"])
def test_with_an_attention_of_its_own_a_model_and_its_reference_differ_by_the_adapters(kind):
    """The reference is the policy without its adapters, as `tdpo` has it."""
    family, pairs = BY_KIND[kind], random_pairs(4, longest=20)
    targets = tuple(f"{family.linear} {family.stacks}".split())
    adapted, base = adapt(family.build(), targets=targets), family.build()
    merged = merged_weights(adapted)
    policy, plain, row, positions = Policy(adapted, "own"), Policy(base, "own"), assemble(pairs), every_token(pairs)
    with torch.no_grad(), without_adapters(policy.model):
        reference = policy.distributions(row, torch.arange(len(row.tokens)))
        before = pair_logprobs(policy, row, positions)
    with torch.no_grad():
        again = plain.distributions(row, torch.arange(len(row.tokens)))
        assert torch.equal(reference.hidden, again.hidden)
        after = pair_logprobs(policy, row, positions)
        base.load_state_dict(merged, strict=False)
        expected = pair_logprobs(plain, row, positions)
    ours, theirs, begin = (torch.cat([*chosen, *rejected]) for chosen, rejected in (after, expected, before))
    assert (ours - begin).abs().max() > 0.01
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_saved_is_served_by_the_names_of_the_checkpoint(tmp_path):
    """HY-v3's shared experts are `shared_experts` in memory and `shared_mlp` in the checkpoint."""
    base = BY_KIND["hy_v3"].build()
    names = saved(base, tmp_path / "base").keys()
    settings = {"r": 3, "target_modules": ["shared_experts.up_proj"], "alpha_pattern": {"shared_experts.up_proj": 12}}
    peft.get_peft_model(base, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    plain = read_adapter(str(tmp_path / "adapter"), str(tmp_path / "base"))
    assert (
        plain.layers == ("model.layers.1.mlp.shared_mlp.up_proj",)
        and {f"{layer}.weight" for layer in plain.layers} <= names
    )
    assert set(json.loads((tmp_path / "adapter" / SETTINGS).read_text())["target_modules"]) == {
        "shared_experts.up_proj"
    }
    before = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {name.replace("shared_experts", "shared_mlp"): tensor for name, tensor in before.items()}
    assert renamed.keys() != before.keys()
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    assert read_adapter(str(tmp_path / "adapter"), str(tmp_path / "base")).layers == plain.layers, (
        "an older one's names"
    )


@pytest.mark.parametrize(
    ("kind", "layer"), [("qwen2_moe", "shared_expert_gate"), ("gpt2", "c_fc"), ("hrm_text", "q_proj")]
)
def test_an_adapter_on_what_engines_have_otherwise_is_refused(tmp_path, kind, layer):
    base = BY_KIND[kind].build()
    saved(base, tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=[layer])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"{layer}\S+ is no A or B of a linear layer .* \(routers aside\)"):
        read_adapter(str(tmp_path / "adapter"), str(tmp_path / "base"))
