"""A second set of weights beside those that a vLLM model computes with, made ready to take their place in an instant.

For engines on CPUs, whose layers hold their weights packed. vLLM's own way to reload them (layer by layer, in place)
does all of its work while the engine stands still: copies of the weights, and the packing. Here the engine goes on with
the old set meanwhile, a few milliseconds at a time, and all that is left for the pause is to exchange references. It
costs the memory of a second set for as long as a swap takes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import layerwise_groups
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from sampo_ray.errors import WeightsError

CHUNK_BYTES = 8 << 20
"""Tensors that are loaded together: each call of a model's loader walks over all of its parameters."""


class SpareWeights:
    """The modules of `model` with other tensors. `prepare` fills them, `adopt` makes them the model's own.

    Only what the preparation changed is adopted, so whatever else happens to the modules in between is kept.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._live = dict(named_parameters(model))
        self._before = [(module, dict(vars(module))) for module in model.modules()]
        self._spare = [self._empty(module) for module, _ in self._before]

    def prepare(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Loads a checkpoint and processes it as vLLM does after loading; yields every few milliseconds.

        Between its steps the model computes with its old weights. Layer by layer, so that no more than one layer's
        weights are there unpacked. WeightsError when the checkpoint lacks some.
        """
        held, loaded = dict(tensors), set[str]()
        unprocessed = {name: module for name, module in self._model.named_modules() if is_processed(module)}
        for group in layerwise_groups(list(held)):
            with self._in_place():  # into tensors without data, only to learn where it goes
                filled = self._model.load_weights([(name, held[name]) for name in group])
                allocated = self._allocate(filled)
            for tensor in allocated:
                yield from touched(tensor)
            for chunk in chunks((name, held[name]) for name in group):
                with self._in_place():
                    self._model.load_weights(chunk)
                yield
            loaded |= filled
            for name in {name.rpartition(".")[0] for name in filled} & unprocessed.keys():
                yield from self._process(unprocessed.pop(name))
        with self._in_place():
            self._share(loaded)
        for module in unprocessed.values():
            yield from self._process(module)
        with self._in_place():  # last, as vLLM does it: it may take what it needs from other modules
            for module in self._model.modules():
                if is_deferred_attention_layer(module):
                    module.process_weights_after_loading(self._dtype)

    def adopt(self) -> None:
        """The model computes with these weights from now on."""
        for (module, before), spare in zip(self._before, self._spare, strict=True):
            vars(module).update({key: value for key, value in spare.items() if before.get(key) is not value})

    def _empty(self, module: nn.Module) -> dict[str, Any]:
        """The module's attributes, with parameters in the shapes that they had before packing, and without data."""
        shapes = as_created(module)
        others = {name: p if p is None else materialize_meta_tensor(p) for name, p in module._parameters.items()}
        return {
            **vars(module),
            "_parameters": {**others, **{name: restore_layer_refs(meta, module) for name, meta in shapes.items()}},
            "_buffers": dict(module._buffers),
            "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
        }

    def _allocate(self, names: Iterable[str]) -> list[torch.Tensor]:
        allocated = []
        for path, _, own in (name.rpartition(".") for name in names):
            module = self._model.get_submodule(path)
            if module._parameters[own].is_meta:
                module._parameters[own] = materialize_meta_tensor(module._parameters[own])
                allocated.append(module._parameters[own])
        return allocated

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        live = [vars(module) for module, _ in self._before]
        self._exchange(self._spare)
        try:
            with torch.no_grad():
                yield
        finally:
            self._exchange(live)

    def _exchange(self, states: Iterable[dict[str, Any]]) -> None:
        for (module, _), state in zip(self._before, states, strict=True):
            object.__setattr__(module, "__dict__", state)  # torch's own way takes ten times as long

    def _process(self, module: Any) -> Iterator[None]:
        """What vLLM does with a module whose weights are loaded: on CPUs, packing them."""
        with self._in_place():
            is_head = isinstance(module, ParallelLMHead) or module is getattr(self._model, "lm_head", None)
            if isinstance(module, VocabParallelEmbedding) and not is_head:
                module.cpu_linear = nn.functional.linear  # vLLM packs a second copy here, which nobody computes with
                return
            nbytes = max(parameter.nbytes for parameter in module.parameters(recurse=False))
        yield from touched(torch.empty(nbytes, dtype=torch.uint8))  # freed at once, for the packed copy to take
        with self._in_place():
            module.quant_method.process_weights_after_loading(module)
            if hasattr(module, "update_param_tp_status"):
                module.update_param_tp_status()
        yield

    def _share(self, loaded: set[str]) -> None:
        """A parameter that was not in the checkpoint is another one's under a second name (a tied head), or missing."""
        live, spare = self._live, named_parameters(self._model)
        found = {id(live[name]): new for name, new in spare if name in loaded and name in live}
        for path, module in self._model.named_modules():
            created = as_created(module)
            for own, parameter in module._parameters.items():
                name = f"{path}.{own}" if path else own
                if parameter is None or name in loaded:
                    continue
                twin = found.get(id(live.get(name)))
                if twin is None and own in created:
                    raise WeightsError(f"the new weights have no {name}; a version holds all tensors of its model")
                module._parameters[own] = live[name] if twin is None else twin


def as_created(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters, without data, as vLLM created them for a checkpoint (all but biases)."""
    parameters, _ = get_layerwise_info(module).restore_metadata
    return parameters


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def touched(tensor: torch.Tensor) -> Iterator[None]:
    """Writes zeros to a new large tensor, a chunk at a time: the first touch of memory can take longer than its use (on
    a virtual machine 56 MB took 100 ms).
    """
    data = tensor.detach().flatten().view(torch.uint8)
    for start in range(0, data.numel() - CHUNK_BYTES, CHUNK_BYTES):
        data[start : start + CHUNK_BYTES] = 0
        yield


def chunks(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors in their order, in lists of about CHUNK_BYTES."""
    held = list(tensors)
    ends = accumulate(tensor.nbytes for _, tensor in held)
    numbered = zip(((end - 1) // CHUNK_BYTES for end in ends), held, strict=True)
    for _, group in groupby(numbered, key=lambda item: item[0]):
        yield [tensor for _, tensor in group]


def is_processed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
