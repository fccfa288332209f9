"""Loading a model: every tensor as its files have it, and in the data type that training computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from sampo_ray.errors import ConfigError, first_line
from sampo_ray.internals.transformers import loaded_tensors_stay
from sampo_ray.training.pretrained import lacks


def load_model(
    path: str | Path,
    attention: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[PretrainedConfig], PretrainedConfig] = lambda config: config,
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder or hub name, safetensors only.

    `tensors`, under a checkpoint's names, take the place of those of its files; the model may share their memory.
    `change` is made to its configuration.
    Parameters are in `dtype` but those, like buffers, that transformers keeps in fp32. ConfigError, naming
    `model.path`, when it cannot be opened or lacks tensors, in whose place transformers would make some up.
    """
    settings: dict[str, object] = {"dtype": dtype, "output_loading_info": True}
    if attention is not None:
        settings["attn_implementation"] = attention
    kind: Any = AutoModelForCausalLM
    try:
        settings["config"] = config = change(AutoConfig.from_pretrained(str(path)))
        if tensors is not None:
            settings["state_dict"] = dict(tensors)
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with loaded_tensors_stay():
            model, found = kind.from_pretrained(
                str(path) if tensors is None else None, use_safetensors=True, **settings
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={str(path)!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # of a version of an earlier release, say, without its buffers
        raise ConfigError(f"model.path={str(path)!r}: {lacks(missing, model)}")
    loaded: PreTrainedModel = model
    return loaded


def in_training_dtype(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """Makes all parameters `dtype`, which DeepSpeed does to those that it trains; a reference must compute the same.

    What transformers keeps in fp32 although the class does not train it (the bias by which Ernie's router chooses
    experts) becomes a persistent buffer, which DeepSpeed leaves as it is.
    """
    kept = {name: each for name, each in model.named_parameters() if each.is_floating_point() and each.dtype != dtype}
    if not kept:
        return
    with torch.device("meta"):
        as_made = type(model)(model.config)  # loaded parameters all require gradients
    for name, parameter in kept.items():
        if as_made.get_parameter(name).requires_grad:
            parameter.data = parameter.data.to(dtype)
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, attribute)
        module.register_buffer(attribute, parameter.detach())
