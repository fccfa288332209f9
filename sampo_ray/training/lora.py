"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters on the matrices of a frozen model.

Each round has adapters of its own. They start at zero, so that the policy *is* the reference at that point. Within the
round they are published alone. What ends it, is exported and starts the next is the model with them merged in.

peft puts them around the linear layers that a model calls. A weight that it reads otherwise is updated where it is kept
(`updates.py`): experts of a mixture, and layers whose class takes their weight itself.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sampo_ray.errors import ConfigError, first_line
from sampo_ray.internals.transformers import checkpoint_name
from sampo_ray.training.head import decoder_of
from sampo_ray.training.updates import LowRankUpdate, add_update, updated

if TYPE_CHECKING:
    from sampo_ray.config.sections import LoraConfig

ADAPTER = "default"  # peft's name for the only adapter of a model
MATRICES = ("A", "B")
ROUTERS = re.compile(r"(^|\.)(gate|\w*router\w*|\w*expert_gate)(\.|$)")
UNUSED = re.compile(r"(^|\.)(indexer|pooler|encoder_attn|crossattention|image_encoder|\w*vision\w*)(\.|$)")
UPDATES = re.compile(r"\.lora_[AB](\.default\.weight)?$")

Linear: TypeAlias = nn.Linear | Conv1D


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freezes a model and gives its targeted weights adapters, in its dtype: A random by `seed`, B zero.

    `model` may be on the meta device. ConfigError, naming `model.lora.targets`, for names that match no weight that may
    have adapters, and where peft cannot give them to a layer.
    """
    model.requires_grad_(False)
    targets, linear = _targets(model, config), linear_layers(model)
    around = [name for name in targets if name in linear and _is_called(model, name, linear[name])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add_around(model, around, config)
        for name in targets:
            if name not in around:
                outer, _, last = (f"{name}.weight" if name in linear else name).rpartition(".")
                add_update(model.get_submodule(outer), last, config.rank, config.scaled_by / config.rank)
    _check_adapted(model, targets)


def _add_around(model: PreTrainedModel, layers: list[str], config: LoraConfig) -> None:
    """Puts peft's adapters around these layers.

    peft is told their names by those of an adapter's weights. What it is given as `target_modules` it rewrites by the
    names of a checkpoint: `mlp.down_proj` of a dense layer then means the experts of all others.
    """
    import peft

    if not layers:
        return
    names = {f"{name}.lora_A.weight": torch.empty(0) for name in layers}
    settings = peft.LoraConfig(**peft_settings(config, []))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that target_modules names none of them
            peft.inject_adapter_in_model(settings, model, ADAPTER, state_dict=names)
    except Exception as error:  # of any kind, by layer
        raise ConfigError(
            f"model.lora.targets: peft gives {type(model).__name__} no adapters on {_short(layers)} "
            f"({first_line(error)}); name others, or remove model.lora"
        ) from error


def _check_adapted(model: PreTrainedModel, targets: list[str]) -> None:
    """ConfigError unless the adapted weights are exactly those of `targets`."""
    adapted = {name for name, weight in named_weights(model) if weight.adapter}
    asked = {name if name in adapted else f"{name}.weight" for name in targets}
    if adapted != asked:
        raise ConfigError(
            f"model.lora.targets: of {type(model).__name__} peft adapts other weights than those asked for "
            f"({_short(adapted ^ asked)}); name others, or remove model.lora"
        )


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

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | LowRankUpdate)]

    def enable(enabled: bool) -> None:
        for layer in layers:
            if isinstance(layer, LowRankUpdate):
                layer.enabled = enabled
            else:
                layer.enable_adapters(enabled)

    enable(False)
    try:
        yield
    finally:
        enable(True)


def linear_layers(model: PreTrainedModel) -> dict[str, Linear]:
    """The linear layers that may have adapters, by name: those of the decoder but for the head, those that share their
    weight with another layer or the embeddings, and those that no gradient of a text reaches.

    Engines do not serve adapters on head and embeddings. A merge into a weight that is shared changes all that have it.
    """
    ends, own = (model.get_output_embeddings(), model.get_input_embeddings()), _own_parameters(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in ends and id(module.weight) in own
        if not UNUSED.search(name)
    }


def _own_parameters(model: PreTrainedModel) -> set[int]:
    """The ids of the parameters that a model's decoder has, and under one name alone."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {id(each) for each in decoder_of(model).parameters() if counts[id(each)] == 1}


def adaptable_layers(model: PreTrainedModel) -> dict[str, Linear]:
    """What `all-linear` means: the linear layers without those that route tokens to experts."""
    return {name: layer for name, layer in linear_layers(model).items() if not ROUTERS.search(name)}


def stacks(model: PreTrainedModel) -> list[str]:
    """Names of the parameters without adapters that are stacks of matrices, mostly the experts of a mixture."""
    others, own = nn.Conv1d | nn.Conv2d | nn.Conv3d | LowRankUpdate | ParametrizationList, _own_parameters(model)
    return [
        f"{outer}.{name}"
        for outer, module in model.named_modules()
        if not isinstance(module, others)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and id(parameter) in own
    ]


def adapter_names(model: PreTrainedModel) -> dict[str, str] | None:
    """The names in the checkpoint of a model's adapted weights, by those in memory, if a file of peft's can say all of
    its adapters; else None.

    It can for plain linear layers that route nothing and are in the checkpoint as they are in memory: not for stacks,
    layers that keep their weight transposed (`Conv1D`), routers, or what a checkpoint has as one tensor with others.
    """
    names = dict[str, str]()
    for name in (name for name, weight in named_weights(model) if weight.adapter):
        outer, _, last = name.rpartition(".")
        layer = model.get_submodule(outer)
        kind = type_before_parametrizations(getattr(layer, "base_layer", layer))
        if kind is not nn.Linear or last != "weight" or ROUTERS.search(outer):
            return None
        if (found := checkpoint_name(model, name)) is None:
            return None
        names[name] = found
    return names


def notes_on(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """What a user is told about the adapters that a model has been given: which weights stay as they are, and what that
    means for versions."""
    notes, stacked = list[str](), _short(stacks(model))
    routers = _short(name for name in linear_layers(model) if ROUTERS.search(name))
    if config.targets == "all-linear" and stacked:
        notes.append(
            f"model.lora.targets='all-linear' does not adapt matrices that are kept as one tensor, as experts are: "
            f"{stacked}; name these to adapt them"
        )
    if config.targets == "all-linear" and routers:
        notes.append(f"model.lora.targets='all-linear' does not adapt routers: {routers}; name these to adapt them")
    if adapter_names(model) is None:
        notes.append(
            "model.lora.targets: with adapters on these weights whole versions are published within rounds too"
        )
    return notes


def _targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the layers and stacks that get adapters, in the model's order."""
    if config.targets == "all-linear":
        names = list(adaptable_layers(model))
        if not names:
            raise ConfigError(
                f"model.lora.targets='all-linear': {type(model).__name__} has no linear layer to adapt, but "
                f"{_short(stacks(model)) or 'nothing else either'}; name that, or remove model.lora"
            )
        return names
    known = [*linear_layers(model), *stacks(model)]
    for target in config.targets:
        if not any(_ends(name, target) for name in known):
            raise ConfigError(
                f"model.lora.targets: {target!r} names no linear layer or experts between embeddings and head, where "
                f"adapters are; this model has {_short(known)}"
            )
    return [name for name in known if any(_ends(name, target) for target in config.targets)]


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}") or f".{name}".endswith(f".{target}.weight")


def _short(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))


def _is_called(model: PreTrainedModel, name: str, layer: Linear) -> bool:
    """Whether the model only calls this layer, so that an adapter around it does what an update of its weight does."""
    outer, _, last = name.rpartition(".")
    code = "".join(map(_code, type(model.get_submodule(outer)).__mro__))
    return type(layer) is nn.Linear and not re.search(rf"self\.{last}\.weight\b(?!\.(dtype|device|shape))", code)


@functools.cache
def _code(owner: type) -> str:
    return inspect.getsource(owner) if owner.__module__.startswith("transformers.models.") else ""


@dataclass(frozen=True)
class Weight:
    """A parameter of the model without adapters and, if it has an adapter, its A and B, and what B A is scaled by."""

    parameter: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter] | None = None
    scaling: float = 1.0

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameter and, with an adapter, A [..., rank, in] and B [..., out, rank]."""
        return [self.parameter, *(self.adapter or ())]

    def merged(self, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """W + alpha/rank * B A, fp32, from the `value` of each part; without an adapter that of the parameter."""
        if self.adapter is None:
            return value(self.parameter)
        weight, a, b = map(value, self.parts)
        return merged(weight, a, b, self.scaling)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + `scaling` B A, fp32, of W [out, in], A [rank, in] and B [out, rank], or of stacks of these."""
    return updated(weight.float(), a.float(), b.float(), scaling)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The parameters of a model, with adapters or without, by their names in the model without adapters: one that is
    shared under each of its names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if UPDATES.search(name):
            continue
        outer, around, last = name.rpartition(".base_layer.")
        module, within, tensor = name.removesuffix(".original").rpartition(".parametrizations.")
        if around:
            layer: Any = model.get_submodule(outer)
            matrices = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            adapted = Weight(parameter, matrices, layer.scaling[ADAPTER])
            yield f"{outer}.{last}", adapted if last == "weight" else Weight(parameter)
        elif within:
            update: Any = model.get_submodule(f"{module}.parametrizations.{tensor}.0")
            yield f"{module}.{tensor}", Weight(parameter, (update.lora_A, update.lora_B), update.scaling)
        else:
            yield name, Weight(parameter)


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's checkpoint, by their names in the model without adapters."""
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved:
            yield name.replace(".base_layer.", "."), buffer
