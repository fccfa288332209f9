"""What makes a model's forward pass differ from one call to the next, and is never trained with: dropout and jitter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

DROPOUT = ("drop",)
NOISE = (*DROPOUT, "jitter")
"""What names of probabilities and amplitudes of noise hold, in configurations as in modules."""
OTHER_HEADS = ("classifier_", "summary_")
"""How names begin that belong to heads which a causal language model does not have."""


def noise_in(config: PretrainedConfig) -> dict[str, float]:
    """Dropout and jitter of a text configuration by name, those of its sections as `section.name`; those above 0."""
    found: dict[str, float] = {}
    for prefix, section in _sections(config.get_text_config()):
        values = section if isinstance(section, dict) else vars(section)
        found |= {f"{prefix}{name}": values[name] for name in _noisy(values)}
    return found


def without_noise(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with all dropout at 0, for a model that gives the same result in training as else.

    Jitter stays: modules add it only if they are told that they are trained, which `Policy.train` does not do, and
    PhiMoE's router compares scores with it at all times.
    """
    config = copy.deepcopy(config)
    for _, section in _sections(config):
        for name in _noisy(section if isinstance(section, dict) else vars(section), DROPOUT):
            if isinstance(section, dict):
                section[name] = 0.0
            else:
                setattr(section, name, 0.0)
    if getattr(config, "rescale_every", 0):  # RWKV halves its weights for that in place, whenever it is not trained
        config.rescale_every = 0
    return config


def silence(model: nn.Module) -> None:
    """Sets to 0 what dropout a model's modules hold by other names than their configuration does."""
    for module in model.modules():
        for name in _noisy(vars(module), DROPOUT):
            setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _sections(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig | dict[str, Any]]]:
    """A configuration and what is nested in it, each with the beginning of its fields' names."""
    yield "", config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from ((f"{name}.{inner}", section) for inner, section in _sections(value))
        elif isinstance(value, dict) and not name.startswith("_"):
            yield f"{name}.", value


def _noisy(values: dict[str, Any], kinds: tuple[str, ...] = NOISE) -> list[str]:
    return [
        name
        for name, value in values.items()
        if isinstance(value, float) and value > 0
        if any(each in name for each in kinds) and not name.startswith(OTHER_HEADS)
    ]
