"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters on the linear layers of a frozen model.

Each round has adapters of its own. They start at zero, so that the policy *is* the reference at that point. Within the
round they are published alone. What ends it, is exported and starts the next is the model with them merged in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sampo_ray.errors import ConfigError

if TYPE_CHECKING:
    from sampo_ray.config.sections import LoraConfig

ADAPTER = "default"  # peft's name for the only adapter of a model
MATRICES = ("A", "B")


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freezes a model and gives its targeted linear layers adapters, in its dtype: A random by `seed`, B zero.

    `model` may be on the meta device. ConfigError, naming `model.lora.targets`, for names that match no linear layer.
    """
    import peft

    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(**peft_settings(config, _targets(model, config))), model, ADAPTER)


class PeftSettings(TypedDict):
    r: int
    lora_alpha: int
    target_modules: list[str]
    lora_dropout: float


def peft_settings(config: LoraConfig, layers: list[str]) -> PeftSettings:
    """peft's settings for adapters on these layers."""
    return {"r": config.rank, "lora_alpha": config.scaled_by, "target_modules": layers, "lora_dropout": 0.0}


def file_name(weight: str, matrix: str) -> str:
    """The name in peft's files of the A or B of a weight (`model.layers.0.mlp.down_proj.weight`)."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{matrix}.weight"


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within, the model computes without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that adapters may be on, by name: all but the head and what shares weights with the embeddings.

    Engines do not serve adapters on these and, where head and embeddings are one tensor, a merge changes both.
    """
    ends = [end for end in (model.get_output_embeddings(), model.get_input_embeddings()) if end is not None]
    weights = {id(end.weight) for end in ends}
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: each for name, each in linear.items() if each not in ends and id(each.weight) not in weights}


def _targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the layers that get adapters."""
    layers = list(adaptable_layers(model))
    if config.targets == "all-linear":
        return layers
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in config.targets}
    for target, names in found.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"model.lora.targets: {target!r} names no linear layer between embeddings and head, where adapters "
                f"are; this model has {known}"
            )
    return [name for names in found.values() for name in names]


@dataclass(frozen=True)
class Weight:
    """A parameter of the model without adapters, and peft's layer around it if it has one."""

    parameter: nn.Parameter
    layer: Any

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameter and, with an adapter, A [rank, in] and B [out, rank]."""
        adapter = [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight] if self.layer else []
        return [self.parameter, *adapter]

    def merged(self, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """W + alpha/rank * B A, fp32, from the `value` of each part; without an adapter that of the parameter."""
        if self.layer is None:
            return value(self.parameter)
        weight, a, b = map(value, self.parts)
        return merged(weight, a, b, self.layer.scaling[ADAPTER])


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + `scaling` B A, fp32, of W [out, in], A [rank, in] and B [out, rank]."""
    return weight.float().addmm(b.float(), a.float(), alpha=scaling)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The parameters of a model, with adapters or without, by their names in the model without adapters."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        outer, adapted, last = name.rpartition(".base_layer.")
        layer = model.get_submodule(outer) if adapted and last == "weight" else None
        yield f"{outer}.{last}" if adapted else name, Weight(parameter, layer)
