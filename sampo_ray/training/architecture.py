"""Which models can be trained, and how: what a model's head and attention compute, by its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sampo_ray.config.rows import Attention
from sampo_ray.errors import ConfigError, described, first_line
from sampo_ray.training import attention
from sampo_ray.training.head import head_of
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.noise import without_noise

if TYPE_CHECKING:
    from sampo_ray.config.sections import LoraConfig


IMPLEMENTATIONS: dict[Attention, str | None] = {"segments": attention.NAME, "flex": attention.FLEX, "own": None}
"""What transformers is told to compute attention with; None: what it chooses for the model."""


ENCODERS = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        "xmod",
    }
)
"""Types of models that see later tokens unless their `is_decoder` is true."""

BIDIRECTIONAL = frozenset({"cpmant", "reformer", "xlm", "xlnet"})
"""Types of models that see later tokens."""

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Fields of every configuration that is supported, by these names or others that transformers knows."""

ROW_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as configurations name them, whose attention is computed in rows of pairs."""


EXACT = frozenset(
    {
        *("afmoe", "apertus", "arcee", "aria_text", "axk1", "bitnet", "cohere", "cohere2", "cohere2_moe"),
        *("cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1"),
        *("emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2"),
        *("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe"),
        *("glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe"),
        *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense"),
        *("hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jetmoe", "laguna", "llama", "longcat_flash", "mellum"),
        *("mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral"),
        *("mixtral", "modernbert-decoder", "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe"),
        *("opt", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_moe", "qwen3"),
        *("qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu"),
    }
)
"""Types of models whose log-probs and gradients in rows of pairs are those of plain transformers, by tests/families."""


def check_architecture(model: PreTrainedModel, kind: Attention = "segments") -> None:
    """ConfigError for a model whose head or attention would be computed wrongly; it may be on the meta device."""
    name, config = type(model).__name__, model.config.get_text_config()
    if missing := [field for field in SIZES if getattr(config, field, None) is None]:
        raise ConfigError(f"model.path: {name} has no {missing[0]}, as language models have; choose another model")
    head_of(model)
    if reason := reads_ahead(model.config):
        raise ConfigError(f"model.path: {name} sees tokens before they are written ({reason}); choose another model")
    if kind != "own" and (reason := not_in_rows(model)):
        raise inexact(model, kind, reason)


def reads_ahead(config: PretrainedConfig) -> str | None:
    """What of a configuration makes its model see the tokens that follow; None for a model that does not."""
    for part in (config, config.get_text_config()):
        if part.model_type in BIDIRECTIONAL:
            return f"model_type={part.model_type}"
        if part.model_type in ENCODERS and not part.is_decoder:
            return f"{part.model_type} with is_decoder=False"
        if (said := getattr(part, "use_bidirectional_attention", None)) in (True, "all"):
            return f"use_bidirectional_attention={said}"
        if not getattr(part, "is_causal", True):  # transformers then makes other masks, for any model
            return f"is_causal={part.is_causal}"
        if part.model_type == "doge" and part.is_moe:  # tokens are routed by the scores of others
            return f"is_moe={part.is_moe}"
    return None


def not_in_rows(model: PreTrainedModel) -> str | None:
    """What of a model's attention cannot be computed in rows of pairs, as far as its configuration says; or None."""
    if not model.is_backend_compatible():
        return "it has an attention of its own"
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    if kinds := set(layers) - ROW_LAYERS:
        return f"it has layers of {' and '.join(sorted(kinds))}"
    if getattr(config, "attn_temperature_tuning", False):  # Llama-4's
        return "attn_temperature_tuning counts a row's tokens, not those of a sequence"
    return None


def not_exact(model: PreTrainedModel) -> str | None:
    """Why a model's attention may not be computed in rows of pairs of any length; or None."""
    if reason := not_in_rows(model):
        return reason
    kind = model.config.get_text_config().model_type
    return None if kind in EXACT else f"{kind} models were not compared with transformers so"


def inexact(model: PreTrainedModel, kind: Attention, reason: str) -> ConfigError:
    """The error for a model whose attention is not to be computed so."""
    name = type(model).__name__
    return ConfigError(f"model.attention={kind!r} is not exact for {name}: {reason}; use model.attention=own")


def longrope_boundary(config: PretrainedConfig) -> int | None:
    """Tokens up to which a longrope model has one set of frequencies, and beyond which another; None for others."""
    settings = getattr(config, "rope_parameters", None) or {}
    for each in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope":
            name = "original_max_position_embeddings"
            return int(each.get(name) or getattr(config, name, None) or config.max_position_embeddings)
    return None


def keys_picked(config: PretrainedConfig) -> int | None:
    """Tokens up to which a model whose indexer picks keys picks all of them; None for models without one."""
    picked = getattr(config.get_text_config(), "index_topk", None)
    return int(picked) if picked else None


def on_meta(config: PretrainedConfig, lora: LoraConfig | None = None, kind: Attention = "own") -> PreTrainedModel:
    """The bf16 model of a configuration on the meta device, without weights; with adapters if `lora` is given.

    ConfigError, naming `model.path`, if it is not a causal one, or `model.lora.targets` if these match nothing.
    """
    silent, how = without_noise(config), IMPLEMENTATIONS[kind]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                silent, dtype=torch.bfloat16, attn_implementation=how
            )
    except ValueError as error:
        raise ConfigError(f"model.path: not a causal language model: {first_line(error)}") from None
    except Exception as error:  # of a model's code, which may be any
        raise ConfigError(
            f"model.path: no {config.model_type} can be made of its config.json: {described(error)}"
        ) from None
    if lora is not None:
        add_adapters(model, lora, seed=0)
    return model
