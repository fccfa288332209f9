"""torch's private interfaces, checked with torch 2.13.0."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

ModuleState: TypeAlias = dict[str, object]
"""All attributes of a module: its `__dict__`, which holds parameters and buffers in dictionaries of their own."""


def init_amx() -> None:
    """Asks the operating system for AMX tiles, without which vLLM's bf16 kernels end a worker with SIGILL. Does nothing
    on a CPU without AMX. Reaches `torch.cpu._init_amx`.
    """
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters, to be read and set without the checks of `setattr`. Reaches `Module._parameters`."""
    return module._parameters  # type: ignore[return-value]


def copied_state(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> ModuleState:
    """The module's state with other parameters; setting an attribute in one state leaves the other as it is.

    Reaches `Module._parameters`, `._buffers` and `._non_persistent_buffers_set`.
    """
    return {
        **vars(module),
        "_parameters": dict(parameters),
        "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
    }


def set_state(module: nn.Module, state: ModuleState) -> None:
    """Gives the module another state at once. torch sets attribute by attribute, which takes ten times as long."""
    object.__setattr__(module, "__dict__", state)
