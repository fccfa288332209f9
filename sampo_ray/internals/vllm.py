"""vLLM's undocumented interfaces, checked with vllm 0.29.0: the state of an engine's requests, and of loaded layers."""

from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(frozen=True)
class RequestProgress:
    """How far an engine request is."""

    external_id: str  # the one it was sent with; for a list of prompts with `-` and the prompt's position added
    index: int  # among the `n` completions of its prompt
    n: int
    tokens: int


def requests_in_flight(engine: AsyncLLM) -> list[RequestProgress]:
    """The engine's unfinished requests. Reaches `AsyncLLM.output_processor.request_states`."""
    return [
        RequestProgress(s.external_req_id, s.request_index, s.n or 1, s.detokenizer.num_output_tokens())
        for s in engine.output_processor.request_states.values()
    ]


def parameters_as_created(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters as vLLM created them for a checkpoint (all but biases): shapes without data, which its
    layerwise reloading recorded in `restore_metadata` before it packed the weights.
    """
    parameters, _ = get_layerwise_info(module).restore_metadata
    return {name: restore_layer_refs(meta, module) for name, meta in parameters.items()}


def allocated(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of vLLM's layers with memory, not initialised. Reaches `materialize_meta_tensor`."""
    return materialize_meta_tensor(tensor)


def quant_method(module: nn.Module) -> QuantizeMethodBase | None:
    """How vLLM processes the module's weights after loading, which on a CPU packs them; None: not at all."""
    method = getattr(module, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def process_weights(module: nn.Module) -> None:
    """Does what vLLM does with a module that has a `quant_method` after loading its weights."""
    method = quant_method(module)
    assert method is not None
    method.process_weights_after_loading(module)
    if callable(update := getattr(module, "update_param_tp_status", None)):
        update()


def skip_packing(module: nn.Module, model: nn.Module) -> bool:
    """For an embedding that is no head: has its `cpu_linear` compute with its weights as they are, and returns True.
    vLLM packs a second copy of it on a CPU, which nothing computes with.
    """
    is_head = isinstance(module, ParallelLMHead) or module is getattr(model, "lm_head", None)
    if skipped := isinstance(module, VocabParallelEmbedding) and not is_head:
        module.cpu_linear = nn.functional.linear
    return skipped


def pack_heads(model: nn.Module) -> None:
    """Packs the heads of a model on a CPU again: at a reload, vLLM 0.29 leaves the packed copy of a tied head old."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
