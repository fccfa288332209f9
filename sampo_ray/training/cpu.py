"""bf16 products summed in fp32 on CPUs: with their bf16 instructions or, where these are missing or slower, with fp32
kernels.

A product of two bf16 numbers is exact in fp32, so a bf16 matrix product done in fp32 and rounded once is what bf16
hardware computes. torch's fallback on CPUs without (AVX2) was measured 5 times (forward) and 25 times (backward)
slower. Intel's AVX512-BF16 without AMX, as some virtual machines have it, was measured at 0.6 of the rate of fp32.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sampo_ray.internals.torch import cpu_has_amx, cpu_has_bf16


class Context(Protocol):
    """What a function with a backward pass of its own keeps from its forward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


@functools.cache
def fast_bf16() -> bool:
    """Whether this CPU's bf16 products are faster than its fp32 ones."""
    info = Path("/proc/cpuinfo")
    intel = info.exists() and "GenuineIntel" in info.read_text()
    return cpu_has_amx() or (cpu_has_bf16() and not intel)


def wants_fp32(x: Tensor) -> bool:
    """Whether products of this tensor are computed with fp32 kernels."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not fast_bf16()


class _Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in] transposed; saves bf16, computes fp32, returns bf16."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (needs_x, needs_weight), grad = ctx.saved_tensors, ctx.needs_input_grad, grad.float()
        of_x = (grad @ weight.float()).to(x.dtype) if needs_x else None
        rows = grad.flatten(0, -2)
        return of_x, (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if not wants_fp32(x):  # the model has gone to a GPU
        return nn.functional.linear(x, self.weight, self.bias)
    y: Tensor = _Linear.apply(x, self.weight)
    return y if self.bias is None else y + self.bias


def use_fp32_kernels(model: nn.Module) -> None:
    """Makes the linear layers of a bf16 model use fp32 kernels if this CPU has no fast bf16 instructions."""
    for module in model.modules():
        if type(module) is nn.Linear and wants_fp32(module.weight):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


@contextmanager
def bf16_products(of: Tensor) -> Iterator[None]:
    """Within, fp32 matrix products use bf16 instructions: factors are rounded to bf16, sums stay fp32. Only where `of`
    is bf16 on a CPU on which these are fast.

    So a product of fp32 copies of bf16 numbers keeps its fp32 sums, which a bf16 product would round. (torch's CPU `mm`
    has no `out_dtype`.) The setting is that of the process: for one thread at a time.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if of.device.type == "cpu" and of.dtype == torch.bfloat16 and fast_bf16():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
