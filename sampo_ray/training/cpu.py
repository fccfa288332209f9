"""bf16 products summed in fp32: through fp32 kernels on CPUs without bf16 instructions, else through those.

A product of two bf16 numbers is exact in fp32, so a bf16 matrix product done in fp32 and rounded once is what bf16
hardware computes. torch's own fallback on such CPUs (AVX2) was measured 5 times (forward) and 25 times (backward)
slower.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@functools.cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers itself (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def wants_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bf16()


class _Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in] transposed; saves bf16, computes fp32, returns bf16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad = grad.float()
        of_x, of_weight = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(x.dtype) if of_x else None,
            (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if of_weight else None,
        )


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if not wants_fp32(x):  # the model has gone to a GPU
        return nn.functional.linear(x, self.weight, self.bias)
    y = _Linear.apply(x, self.weight)
    return y if self.bias is None else y + self.bias


def use_fp32_kernels(model: nn.Module) -> None:
    """Makes the linear layers of a bf16 model compute through fp32 where the CPU has no bf16; else does nothing."""
    for module in model.modules():
        if type(module) is nn.Linear and wants_fp32(module.weight):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


@contextmanager
def bf16_products(of: Tensor) -> Iterator[None]:
    """Within, fp32 matrix products round factors to bf16 and sum in fp32, where `of` is bf16 on a CPU that has it.

    A product of fp32 copies of bf16 numbers so keeps its fp32 sums, which a bf16 product rounds. (torch's CPU `mm` has
    no `out_dtype`.) The setting is the process's: for one thread at a time.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if of.device.type == "cpu" and of.dtype == torch.bfloat16 and has_bf16():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
