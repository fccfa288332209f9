"""Low-rank updates of weights where they are kept: for those that no call of a linear layer reads.

peft puts its adapters around a linear layer and adds to what the layer returns. That misses a layer whose weight the
model reads itself (Mamba's `dt_proj`), and matrices that are no layer, such as the experts of a mixture, which are one
tensor. Here the weight itself becomes W + scaling B A, whoever reads it (torch.nn.utils.parametrize).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRankUpdate(nn.Module):
    """W + scaling B A of a frozen W [..., rows, columns], in its dtype: an A [rank, columns] and a B [rows, rank] for
    each matrix of a stack. A is random, as `nn.Linear` begins, B zero.
    """

    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scaling, self.enabled = scaling, True
        self.lora_A = nn.Parameter(weight.new_empty(*stack, rank, columns).uniform_(-(columns**-0.5), columns**-0.5))
        self.lora_B = nn.Parameter(weight.new_zeros(*stack, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return updated(weight, self.lora_A, self.lora_B, self.scaling) if self.enabled else weight


def updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + `scaling` B A of matrices W [rows, columns], A [rank, columns] and B [rows, rank], or of stacks of these."""
    product = torch.addmm if weight.ndim == 2 else torch.baddbmm
    return product(weight, b, a, alpha=scaling)


def add_update(module: nn.Module, name: str, rank: int, scaling: float) -> None:
    """Makes the parameter `name` of a module its value plus a low-rank update."""
    weight = getattr(module, name)
    parametrize.register_parametrization(module, name, LowRankUpdate(weight, rank, scaling))
    if len(module.parametrizations) == 1:  # type: ignore[arg-type]
        module.forward = _computed_once(module.forward)


def _computed_once(forward):  # type: ignore[no-untyped-def]
    """A module's forward pass in which each of its weights is computed once, however often it is read: once for each
    expert, where these are computed one after another."""

    @functools.wraps(forward)
    def once(*arguments: object, **settings: object) -> object:
        with parametrize.cached():
            return forward(*arguments, **settings)

    return once
