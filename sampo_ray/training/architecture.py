"""Which models can be trained, and how: what a model's head and attention compute, by its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sampo_ray.config.rows import Attention
from sampo_ray.errors import ConfigError, first_line
from sampo_ray.training import attention
from sampo_ray.training.head import head_of
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.noise import without_noise

if TYPE_CHECKING:
    from sampo_ray.config.sections import LoraConfig


IMPLEMENTATIONS: dict[Attention, str | None] = {"segments": attention.NAME, "flex": attention.FLEX, "own": None}
"""What transformers is told to compute attention with; None: what it chooses for the model."""


def check_architecture(model: PreTrainedModel, kind: Attention = "segments") -> None:
    """ConfigError for a model whose head or attention would be computed wrongly; it may be on the meta device."""
    name, config = type(model).__name__, model.config.get_text_config()
    head_of(model)
    if kind == "own":
        return
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    kinds = set(layers) - {"full_attention"}
    if not model.is_backend_compatible() or kinds or getattr(config, "attn_logit_softcapping", None):
        how = " and ".join(sorted(kinds)) or "an attention of its own"
        raise ConfigError(f"model.path: {name} has {how}; only full attention over rows of pairs is supported")


def longrope_boundary(config: PretrainedConfig) -> int | None:
    """Tokens up to which a longrope model has one set of frequencies, and beyond which another; None for others."""
    settings = getattr(config, "rope_parameters", None) or {}
    for each in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope":
            name = "original_max_position_embeddings"
            return int(each.get(name) or getattr(config, name, None) or config.max_position_embeddings)
    return None


def on_meta(config: PretrainedConfig, lora: LoraConfig | None = None, kind: Attention = "segments") -> PreTrainedModel:
    """The model of a configuration on the meta device, without its weights; with adapters if `lora` is given.

    ConfigError, naming `model.path`, if it is not a causal one, or `model.lora.targets` if these match nothing.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                without_noise(config), attn_implementation=IMPLEMENTATIONS[kind]
            )
    except ValueError as error:
        raise ConfigError(f"model.path: not a causal language model: {first_line(error)}") from None
    except KeyError:  # some models look up their attention in a table of their own
        raise ConfigError(f"model.path: {config.model_type} models have an attention of their own") from None
    if lora is not None:
        add_adapters(model, lora, seed=0)
    return model
