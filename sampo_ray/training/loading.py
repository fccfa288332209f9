"""Loading a model: every tensor as its files have it, and in the data type that training computes with.

A model is made without its weights first (`without_weights`), so that whatever is done to it costs no memory. Then each
weight is read: as a whole, or the share of it that a rank keeps, which is read alone where a tensor of the files *is*
the weight. What is made of several tensors, such as the experts of a layer, is made of them one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from sampo_ray.errors import ConfigError, first_line
from sampo_ray.internals.torch import parameters_of
from sampo_ray.internals.transformers import Recipe, StandIn, loaded_tensors_stay
from sampo_ray.training.lora import named_weights
from sampo_ray.training.model_files import ModelFiles
from sampo_ray.training.pretrained import lacks
from sampo_ray.training.tensor_files import StoredTensors, TensorFiles, TensorsInMemory

PIECE = 2**24
"""Elements that are compared at a time."""


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
    model, weights = without_weights(path, attention, tensors, dtype, change)
    weights.fill(model)
    return model


def without_weights(
    path: str | Path,
    attention: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[PretrainedConfig], PretrainedConfig] = lambda config: config,
) -> tuple[PreTrainedModel, Weights]:
    """`load_model` before any weight is read: the model's parameters are on the CPU and have shapes, but no memory.

    Its buffers are as they will be, and so is what no file has. Adapters may be added, layers wrapped.
    """
    settings: dict[str, object] = {"dtype": dtype, "output_loading_info": True}
    if attention is not None:
        settings["attn_implementation"] = attention
    recipe = Recipe()
    try:
        config = change(AutoConfig.from_pretrained(str(path)))
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        text = config.get_text_config()
        files = ModelFiles.find("model.path", str(path))
        stored = stored_in(files) if tensors is None else TensorsInMemory(tensors)
        given = {name: StandIn(shape, dtype) for name, (shape, dtype) in stored.shapes().items()}
        settings |= {"config": text if kind.config_class is type(text) else config, "state_dict": given}
        with loaded_tensors_stay(), recipe.recorded():
            model, found = kind.from_pretrained(None, use_safetensors=True, **settings)
        if "generation_config.json" in files.names:
            model.generation_config = GenerationConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={str(path)!r} cannot be loaded: {first_line(error)}") from error
    weights = Weights(recipe, stored, {name: each.dtype for name, each in given.items()}, model)
    weights.tie(model)
    if missing := sorted(found["missing_keys"]):  # of a version of an earlier release, say, without its buffers
        raise ConfigError(f"model.path={str(path)!r}: {lacks(missing, model)}")
    for name, buffer in [*model.named_buffers()]:
        if buffer.is_meta:
            path_to, _, last = name.rpartition(".")
            setattr(model.get_submodule(path_to), last, weights.whole(name))
    _off_meta(model)
    return model, weights


def stored_in(files: ModelFiles) -> TensorFiles:
    """The tensors of a model's files. ConfigError if there are none that can be read."""
    found = files.weights(files.settings("config.json"))
    return TensorFiles(files.on_disk(name) for name in sorted({weight.file for weight in found.values()}))


def _off_meta(model: nn.Module) -> None:
    """Has the parameters that are on the meta device on the CPU, without memory: what looks at the device of one sees
    where it will be."""
    made = dict[int, Parameter]()
    for module in model.modules():
        own = parameters_of(module)
        for name, parameter in own.items():
            if parameter is not None and parameter.is_meta:
                empty = _empty(parameter, parameter.dtype)
                own[name] = made.setdefault(id(parameter), Parameter(empty, parameter.requires_grad))


_NO_VALUES: dict[torch.dtype, Tensor] = {}
"""The memory of what has no values yet, one number a data type: by it such tensors are told from others."""


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without values, in the memory of one number."""
    return _NO_VALUES.setdefault(dtype, torch.zeros((), dtype=dtype)).expand(like.shape)


def _is_empty(tensor: Tensor) -> bool:
    none = _NO_VALUES.get(tensor.dtype)
    return none is not None and tensor.untyped_storage().data_ptr() == none.untyped_storage().data_ptr()


class Weights:
    """The weights of a model that was made without them, by their names in memory."""

    def __init__(
        self, recipe: Recipe, stored: StoredTensors, dtypes: Mapping[str, torch.dtype], model: PreTrainedModel
    ) -> None:
        self._recipe, self._stored, self._dtypes = recipe, stored, dtypes
        self._shapes = {name: shape for name, (shape, _) in stored.shapes().items()}
        shapes = {name: torch.empty_like(each, device="meta") for name, each in model.named_parameters()}
        self._memory: Any = SimpleNamespace(get_parameter=shapes.__getitem__, config=model.config)

    def whole(self, name: str) -> Tensor:
        """A weight or persistent buffer, in the data type that transformers loads it in."""
        return self._made_with(name)[name]

    def fill(self, model: nn.Module, device: str | torch.device = "cpu") -> None:
        """Reads all weights of the model, one after another, and has the model on a device. It may have adapters."""
        names = self._names(model)
        for name, parameter in names.items():
            if _is_empty(parameter):
                for other, value in self._made_with(name).items():
                    if other in names and _is_empty(names[other]):
                        names[other].data = value.to(device, names[other].dtype)
        self._fill_buffers(model)
        model.to(device)

    def shares(self, model: nn.Module, rank: int, world: int) -> Callable[[Parameter], Tensor]:
        """Gives each parameter's share of a rank, flat: of its elements, divided evenly in their order, those of the
        rank, so that the last ranks may have fewer. Reads no more than that of a weight that the files have as it is.
        """
        self._fill_buffers(model)
        names = {id(parameter): name for name, parameter in self._names(model).items()}
        read = dict[str, Tensor]()  # of weights that were made together with one asked for

        def of(elements: Tensor) -> slice:
            each = -(-elements.numel() // world)
            return slice(min(rank * each, elements.numel()), min((rank + 1) * each, elements.numel()))

        def share(parameter: Parameter) -> Tensor:
            own, name = of(parameter), names.get(id(parameter))
            if name is None or not _is_empty(parameter):
                return parameter.data.reshape(-1)[own].clone()
            if source := self._recipe.stored_as(name):
                return self._read(source, own.start, own.stop).to(parameter.dtype)
            if name not in read:
                made = self._made_with(name)
                read.update({each: value.reshape(-1)[of(value)].clone() for each, value in made.items()})
            return read.pop(name).to(parameter.dtype)

        return share

    def tie(self, model: PreTrainedModel) -> None:
        """Ties those of the weights that the class ties, and the files have both of, that are equal: what transformers
        does with weights that it has loaded."""
        tied = model.all_tied_weights_keys
        both = {one: other for one, other in tied.items() if model.get_parameter(one) is not model.get_parameter(other)}
        equal = {one for one, other in both.items() if self._equal(one, other)}
        for one in both.keys() - equal:
            del tied[one]
        if equal:
            model.tie_weights(missing_keys=equal.copy(), recompute_mapping=False)

    def _equal(self, one: str, other: str) -> bool:
        stored = self._recipe.stored_as(one), self._recipe.stored_as(other)
        if stored[0] is None or stored[1] is None:
            return torch.equal(self.whole(one), self.whole(other))
        count = torch.Size(self._shapes[stored[0]]).numel()
        starts = range(0, count, PIECE)
        pieces = ([self._read(name, at, min(at + PIECE, count)) for name in stored if name] for at in starts)
        return self._shapes[stored[0]] == self._shapes[stored[1]] and all(torch.equal(a, b) for a, b in pieces)

    def _names(self, model: nn.Module) -> dict[str, Parameter]:
        """The weights that are from the files; a shared one under the name that these have."""
        found = ((name, weight.parameter) for name, weight in named_weights(model))
        return {name: parameter for name, parameter in found if name in self._recipe}

    def _fill_buffers(self, model: nn.Module) -> None:
        """Reads the parameters that became buffers since."""
        for name, buffer in model.named_buffers():
            if _is_empty(buffer):
                buffer.data = self.whole(name.replace(".base_layer.", ".")).to(buffer.dtype)

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._stored.read(name, start, stop).to(self._dtypes[name])

    def _made_with(self, name: str) -> dict[str, Tensor]:
        """The weight with those that are made of the same tensors."""
        return self._recipe.made_with(name, lambda source: self._read(source).view(self._shapes[source]), self._memory)


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
            parameter.data = _empty(parameter, dtype) if _is_empty(parameter) else parameter.data.to(dtype)
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, attribute)
        module.register_buffer(attribute, parameter.detach())
