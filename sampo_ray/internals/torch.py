"""torch's private interfaces, checked with torch 2.13.0."""

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, _CachedTorchDispatchMode, create_selective_checkpoint_contexts

ModuleState: TypeAlias = dict[str, object]  # a module's `__dict__`, with parameters and buffers in dicts of their own


def init_amx() -> None:
    """Asks the system for AMX tiles, without which vLLM's bf16 kernels die of SIGILL, by `torch.cpu._init_amx`."""
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters, to be read and set without the checks of `setattr`. Reaches `Module._parameters`."""
    return module._parameters  # type: ignore[return-value]


class _SecondPass(_CachedTorchDispatchMode):
    """Gives out what was kept, and leaves all other operations to run, however many there were in the first pass."""

    def __init__(self, storage: dict[Any, dict[int, Any]], kept: Collection[object]) -> None:
        super().__init__(None, storage)
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._kept:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def checkpoint_contexts(
    policy: Callable[..., CheckpointPolicy], kept: Collection[object]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of selective checkpointing, by whose policy operations in `kept` alone are ever saved.

    torch's own refuse a second pass with other operations than the first. Under ZeRO-3 it has some: weights that were
    freed after the first pass are still there, or are gathered, in the second. Reaches `_CachedTorchDispatchMode`.
    """
    first, second = create_selective_checkpoint_contexts(policy)
    return first, _SecondPass(second.storage, kept)


def copied_state(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> ModuleState:
    """The module's state with other parameters, and copies of the buffers that checkpoints have; setting an attribute
    in one state leaves the other as it is."""
    own = {*module._non_persistent_buffers_set}
    buffers = {name: each if each is None or name in own else each.clone() for name, each in module._buffers.items()}
    state = {"_parameters": dict(parameters), "_buffers": buffers, "_non_persistent_buffers_set": own}
    return {**vars(module), **state}


def set_state(module: nn.Module, state: ModuleState) -> None:
    """Gives the module another state at once. torch sets attribute by attribute, which takes ten times as long."""
    object.__setattr__(module, "__dict__", state)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (AVX512-BF16 or AMX); reads torch.cpu's private checks."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_has_amx() -> bool:
    """Whether this CPU has tiles for bf16 products; reads one of torch.cpu's private checks."""
    return bool(torch.cpu._is_amx_tile_supported())


def limit_recompilations(kernels: int) -> None:
    """Lets torch.compile keep this many kernels of a function; one more is an error. Sets torch._dynamo.config."""
    torch._dynamo.config.recompile_limit = kernels
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def create_block_mask(
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], tokens: int, device: torch.device
) -> flex_attention.BlockMask:
    """FlexAttention's mask [tokens, tokens], made with `_compile` but on CPUs: else it is made from a whole matrix."""
    compiled = device.type != "cpu"
    return flex_attention.create_block_mask(sees, None, None, tokens, tokens, device=device, _compile=compiled)


class MadeUpValues(TorchDispatchMode):
    """Within, what a model reads from tensors on the meta device is made up: a value is 1, one entry is not zero,
    two tensors are equal.

    So a forward pass goes on where it looks at values: whether a mask has padding, which experts are used. Reaches
    torch.utils._python_dispatch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
            if func is torch.ops.aten.equal.default:
                return True
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty(1, args[0].ndim, dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def made_up_values() -> AbstractContextManager[object]:
    """Within, see `MadeUpValues`."""
    return MadeUpValues()
