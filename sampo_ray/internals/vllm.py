"""vLLM's undocumented interfaces, checked with vllm 0.29.0: the state of an engine's requests, of loaded layers, and of
LoRA adapters beside their base.
"""

import contextlib
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, validate_xgrammar_grammar
from vllm.v1.structured_output.request import get_structured_output_key

T = TypeVar("T")


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


def check_constraints(engine: AsyncLLM, check: Callable[[StructuredOutputsParams], Awaitable[None]]) -> None:
    """Has the engine await `check` before it takes a request with a constraint. Replaces this object's `generate`."""
    generate = engine.generate

    def checked(prompt: object, params: SamplingParams, *rest: Any, **more: Any) -> AsyncGenerator[RequestOutput, None]:
        items = generate(prompt, params, *rest, **more)
        return items if params.structured_outputs is None else _after(check(params.structured_outputs), items)

    engine.generate = checked


async def _after(check: Awaitable[None], items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    await check
    async with contextlib.aclosing(items):
        async for item in items:
            yield item


def constraint_trial(engine: AsyncLLM) -> Callable[[StructuredOutputsParams], None]:
    """Compiles a constraint and asks for its first tokens, as the engine's process would, with its compiler and tokens.
    Raises its errors, and ValueError for a constraint that no answer satisfies. Reaches `vllm.v1.structured_output`.
    """
    model = engine.vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(model_config=model)
    backend = XgrammarBackend(engine.vllm_config, tokenizer=tokenizer, vocab_size=model.get_vocab_size())
    tokens = backend.allocate_token_bitmask(1)

    def trial(constraint: StructuredOutputsParams) -> None:
        constraint = copy.copy(constraint)
        validate_xgrammar_grammar(SamplingParams(structured_outputs=constraint))
        grammar = backend.compile_grammar(*get_structured_output_key(constraint))
        grammar.fill_bitmask(tokens, 0)
        if not tokens.numpy().any():
            raise ValueError("no answer satisfies them")

    return trial


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
    forget_kernel(method)
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


def forget_kernel(method: QuantizeMethodBase) -> None:
    """Has experts on a CPU packed again: vLLM 0.29 packs them only when it makes their kernel (`moe_kernel`), so that
    after a reload the kernel would take weights that are not packed for packed ones.
    """
    if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def pack_again(model: nn.Module) -> None:
    """Packs what a reload leaves as it is on a CPU, in vLLM 0.29: experts, and the packed copy of a tied head."""
    for module in model.modules():
        method = quant_method(module)
        if isinstance(module, ParallelLMHead) or getattr(method, "moe_kernel", None) is not None:
            process_weights(module)


class AdaptersBesideBase(LRUCacheLoRAModelManager):
    """vLLM's adapters on a CPU: each layer has one slot more, the last, which stays zero, and the head has none at all.

    A token without an adapter has slot -1. vLLM 0.29's kernels for CPUs index with it (`lora/ops/torch_ops`), so that
    requests without an adapter get that of the last slot when any other request of their batch has one. On GPUs the
    Triton kernels return for -1 before they read a weight (`lora/ops/triton_ops`: lora_shrink_op.py, lora_expand_op.py,
    fused_moe_lora_op.py). A head with adapters fails on a CPU at log-probs of a prompt that is not alone in its batch
    ("einsum(): subscript b ..."), which ends the engine. Reaches `_create_lora_modules`, `lora_slots` and
    `_match_target_modules`.
    """

    _more_slots = 0

    @property
    def lora_slots(self) -> int:
        return super().lora_slots + self._more_slots

    def _create_lora_modules(self) -> None:
        self._more_slots = 1
        try:
            super()._create_lora_modules()
        finally:
            self._more_slots = 0

    def _match_target_modules(self, module_name: str, module: nn.Module) -> bool:
        return super()._match_target_modules(module_name, module) and not isinstance(module, VocabParallelEmbedding)


def keep_base_beside_adapters() -> None:
    """Has engines that this process loads from now on answer requests without an adapter with the base's weights,
    whatever shares their batch. Reaches `LRUCacheWorkerLoRAManager._manager_cls`.
    """
    if current_platform.is_cpu():
        LRUCacheWorkerLoRAManager._manager_cls = AdaptersBesideBase


def base_is_kept(model: nn.Module) -> bool:
    """Whether requests without an adapter get the weights of the base, by the state of a loaded engine's model. Reaches
    `lora_manager` of the model, its `modules` and their stacked weights, and its `punica_wrapper_mapping`.
    """
    manager: Any = model.lora_manager
    if not current_platform.is_cpu():
        return {type(each).__name__ for each in manager.punica_wrapper_mapping.values()} == {"PunicaWrapperGPU"}
    layers = manager.modules.values()
    stacks = [stack for layer in layers for side in (layer.lora_a_stacked, layer.lora_b_stacked) for stack in side]
    return bool(stacks) and all(len(each) == manager.lora_slots + 1 and not each[-1].any() for each in stacks)
