"""A train step on one device with torch and transformers alone: the learner's arithmetic without DeepSpeed, ranks and
checkpoints, for measurements, experiments and as a check on the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sampo_ray.training.batching import Pair, Step
from sampo_ray.training.objective import METRICS, LossInputs, accumulate
from sampo_ray.training.policy import Policy
from sampo_ray.training.statistics import Statistics


class MasterWeights:
    """AdamW on fp32 copies of a policy's trained weights; their gradients are summed in fp32 over rows."""

    def __init__(self, policy: Policy, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._weights = [weight for weight in policy.parameters() if weight.requires_grad]
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self._weights]
        for weight, master in zip(self._weights, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(partial(_add_gradient, master))
        self._adamw = torch.optim.AdamW(self.masters, betas=betas, eps=eps, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> Tensor:
        """Updates masters and weights, sets the gradients to zero, and returns their norm from before clipping."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        norm = clip_grad_norm_(self.masters, max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=False)
        for weight, master in zip(self._weights, self.masters, strict=True):
            weight.copy_(master)
        return norm


def _add_gradient(master: nn.Parameter, weight: nn.Parameter) -> None:
    assert master.grad is not None and weight.grad is not None
    master.grad.add_(weight.grad)
    weight.grad = None


def train_step(
    policy: Policy,
    weights: MasterWeights,
    step: Step,
    pairs: Sequence[Pair],
    inputs: LossInputs,
    learning_rate: float,
    max_grad_norm: float = 1.0,
) -> tuple[dict[str, float], Statistics]:
    """One optimizer step over the pairs of a step that was planned for one rank.

    Returns METRICS and `grad_norm`, and the statistics for the next step. Nothing is skipped: values that are not
    finite stay so.
    """
    [rows] = step.rows
    sums, _ = accumulate(policy, rows, pairs, inputs, 1 / step.pairs)
    norm = weights.step(learning_rate, max_grad_norm)
    metrics = dict(zip(METRICS, (sums / step.pairs).tolist(), strict=True))
    return metrics | {"grad_norm": float(norm)}, inputs.statistics.after(metrics, step.pairs)
