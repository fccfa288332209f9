"""A second set of weights for a vLLM model on a CPU, prepared beside those in use and swapped in at once.

A CPU engine's layers hold their weights packed. vLLM reloads them layer by layer and in place, so it copies and packs
while the engine stands still. Here the engine computes with the old set meanwhile, with interruptions of a few
milliseconds, and only references are exchanged in the pause. The price is the memory of a second set during a swap.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import layerwise_groups
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.models.interfaces_base import VllmModel

from sampo_ray.errors import WeightsError
from sampo_ray.internals.torch import ModuleState, copied_state, parameters_of, set_state
from sampo_ray.internals.vllm import allocated, parameters_as_created, process_weights, quant_method, skip_packing

CHUNK_BYTES = 8 << 20
"""Size of the tensors loaded together; more than one, because each call of a model's loader visits all parameters."""


class SpareWeights:
    """The modules of `model` with other tensors. `prepare` fills them; `adopt` makes them the model's."""

    def __init__(self, model: VllmModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._live = dict(named_parameters(model))
        self._before = [(module, dict(vars(module))) for module in model.modules()]
        self._spare = [empty_state(module) for module, _ in self._before]

    def prepare(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Loads a checkpoint and processes it as vLLM does after loading; yields every few milliseconds.

        Between these steps the model computes with its old weights. Works layer by layer, so that at most one layer's
        weights are in memory unpacked. WeightsError when the checkpoint lacks some.
        """
        checkpoint, loaded = dict(tensors), set[str]()
        unprocessed = {name: module for name, module in self._model.named_modules() if quant_method(module)}
        for group in layerwise_groups(list(checkpoint)):
            with self._active():  # loads into tensors without data, only to learn which parameters the group fills
                taken = self._model.load_weights([(name, checkpoint[name]) for name in group])
                filled = {place_of(self._model, name) for name in taken}
                new = self._allocate(filled)
            for tensor in new:
                yield from touched(tensor)
            for chunk in chunks((name, checkpoint[name]) for name in group):
                with self._active():
                    self._model.load_weights(chunk)
                yield
            loaded |= filled
            for name in {name.rpartition(".")[0] for name in filled} & unprocessed.keys():
                yield from self._process(unprocessed.pop(name))
        with self._active():
            self._share(loaded)
        for module in unprocessed.values():
            yield from self._process(module)
        with self._active():  # last, as vLLM does it: these modules may read others
            for module in self._model.modules():
                if is_deferred_attention_layer(module):
                    module.process_weights_after_loading(self._dtype)

    def adopt(self) -> None:
        """The model computes with these weights from now on; other changes to its modules in between are kept."""
        for (module, before), spare in zip(self._before, self._spare, strict=True):
            vars(module).update({key: value for key, value in spare.items() if before.get(key) is not value})

    def _allocate(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Gives the parameters of these names memory; returns the tensors that had none."""
        new = []
        for path, _, name in (name.rpartition(".") for name in names):
            parameters = parameters_of(self._model.get_submodule(path))
            meta = parameters.get(name)  # None: a buffer, which has memory
            if meta is not None and meta.is_meta:
                parameters[name] = tensor = allocated(meta)
                new.append(tensor)
        return new

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Within, the model's modules have the spare weights."""
        modules = [module for module, _ in self._before]
        live = [vars(module) for module in modules]
        for module, state in zip(modules, self._spare, strict=True):
            set_state(module, state)
        try:
            with torch.no_grad():
                yield
        finally:
            for module, state in zip(modules, live, strict=True):
                set_state(module, state)

    def _process(self, module: nn.Module) -> Iterator[None]:
        """Does what vLLM does with a module whose weights are loaded: on a CPU, packs them."""
        with self._active():
            if skip_packing(module, self._model):
                return
            nbytes = max(parameter.nbytes for parameter in module.parameters(recurse=False))
        yield from touched(torch.empty(nbytes, dtype=torch.uint8))  # freed at once, for the packed copy to reuse
        with self._active():
            process_weights(module)
        yield

    def _share(self, loaded: set[str]) -> None:
        """Sets the parameters that the checkpoint has no tensor for: a tied head shares another parameter, a bias keeps
        its value. WeightsError for one that is missing.
        """
        spare = named_parameters(self._model)
        new_of = {id(self._live[name]): new for name, new in spare if name in loaded and name in self._live}
        for path, module in self._model.named_modules():
            created = parameters_as_created(module)
            for attribute, parameter in parameters_of(module).items():
                name = f"{path}.{attribute}" if path else attribute
                if parameter is None or name in loaded:
                    continue
                shared = new_of.get(id(self._live.get(name)))
                if shared is None and attribute in created:
                    raise WeightsError(f"the new weights have no {name}; a version holds all tensors of its model")
                parameters_of(module)[attribute] = self._live[name] if shared is None else shared


def empty_state(module: nn.Module) -> ModuleState:
    """The module's state with parameters in the shapes that they had before packing: those of the checkpoint without
    data, all others with memory.
    """
    parameters = {name: p if p is None else allocated(p) for name, p in parameters_of(module).items()}
    return copied_state(module, {**parameters, **parameters_as_created(module)})


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters by name, a shared one under each of its names."""
    return model.named_parameters(remove_duplicate=False)


def place_of(model: nn.Module, name: str) -> str:
    """The name of a tensor that vLLM's loaders call so: for experts they leave out the module that holds them."""
    path, _, attribute = name.rpartition(".")
    held = model.get_submodule(path)
    if hasattr(held, attribute):
        return name
    (within,) = {each for each, _ in held.named_parameters() if each.rpartition(".")[2] == attribute}
    return f"{path}.{within}"


def touched(tensor: torch.Tensor) -> Iterator[None]:
    """Writes zeros to a new large tensor, a chunk at a time, because the first touch of memory can take longer than its
    use (on a virtual machine 56 MB took 100 ms).
    """
    data = tensor.detach().flatten().view(torch.uint8)
    for start in range(0, data.numel() - CHUNK_BYTES, CHUNK_BYTES):
        data[start : start + CHUNK_BYTES] = 0
        yield


def chunks(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors in their order, in lists of about CHUNK_BYTES."""
    listed = list(tensors)
    ends = accumulate(tensor.nbytes for _, tensor in listed)
    numbered = zip(((end - 1) // CHUNK_BYTES for end in ends), listed, strict=True)
    for _, group in groupby(numbered, key=lambda item: item[0]):
        yield [tensor for _, tensor in group]
