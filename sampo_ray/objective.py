"""One row's contribution to a training step: losses of its pairs, and the sums that metrics are made of. No Ray, no
DeepSpeed.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sampo_ray.batching import Row, assemble
from sampo_ray.config import MethodConfig
from sampo_ray.losses import LOSSES, LossSettings
from sampo_ray.policy import pair_logprobs
from sampo_ray.reduction import REDUCTIONS, MaskKey, Positions, SequenceLogRatios, reduce_pairs

METRICS = (
    "loss",
    "margin",
    "accuracy",
    "chosen_reward",
    "rejected_reward",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_logratio_per_token",
    "rejected_logratio_per_token",
)
"""Means over the pairs of a step. margin = beta * (s_w - s_l), accuracy = share with margin > 0, rewards in beta *
nats.
"""

IDLE_PAIR = pa.table({name: [[0]] for name in ("prompt", "chosen", "rejected")})


@dataclass(frozen=True)
class Draw:
    """Which epoch of which round of a run this is: with the pair's id, all that a token mask depends on."""

    seed: int
    round: int
    epoch: int


def row_positions(method: MethodConfig, draw: Draw, pairs: pa.Table) -> tuple[list[Positions], list[Positions]]:
    """The token positions of each pair that the policy, and that the reference, is summed over.

    They are the same (one mask, Eq. 10) unless `method.mask` is `independent`, which draws again for
    the reference as the authors' code does.
    """
    reduction = REDUCTIONS[method.reduction]
    policy, reference = [], []
    columns = (pairs.column(name) for name in ("id", "chosen", "rejected"))
    for pair, chosen, rejected in zip(*columns, strict=True):
        key = MaskKey(draw.seed, draw.round, draw.epoch, pair.as_py())
        lengths = len(chosen.values), len(rejected.values)
        policy.append(reduction.positions(key, *lengths))
        reference.append(reduction.positions(key, *lengths, stream=1) if method.mask == "independent" else policy[-1])
    return policy, reference


def row_losses(
    policy: nn.Module, row: Row, pairs: pa.Table, method: MethodConfig, draw: Draw
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " metrics"]]:
    """Losses of a row's pairs (a REFERENCE block, at least one pair), and the sums over them of METRICS (detached,
    fp32).
    """
    positions, reference_positions = row_positions(method, draw, pairs)
    chosen, rejected = pair_logprobs(policy, row, positions)
    reference = [
        (torch.tensor(w.values.to_numpy()[at.chosen]), torch.tensor(r.values.to_numpy()[at.rejected]))
        for w, r, at in zip(pairs.column("chosen_ref"), pairs.column("rejected_ref"), reference_positions, strict=True)
    ]
    ratios = reduce_pairs(
        REDUCTIONS[method.reduction],
        [p - ref[0].to(p) for p, ref in zip(chosen, reference, strict=True)],
        [p - ref[1].to(p) for p, ref in zip(rejected, reference, strict=True)],
        [(pair.chosen, pair.rejected) for pair in row.segments],
    )
    losses = LOSSES[method.loss].function(ratios, LossSettings(method.beta, method.label_smoothing))
    return losses, _sums(losses, ratios, row, method.beta)


def idle_loss(policy: nn.Module, device: torch.device) -> Tensor:
    """A rank's part in a row that only others have: exactly zero, with a gradient of zeros for every parameter.

    A parameter without a gradient would take no part in the reduction, and the ranks would mismatch.
    """
    row = assemble(IDLE_PAIR).to(device)
    chosen, _ = pair_logprobs(policy, row, [Positions(np.zeros(1, np.int64), np.zeros(1, np.int64))])
    return chosen[0].sum() * 0.0


@torch.no_grad()
def _sums(losses: Tensor, ratios: SequenceLogRatios, row: Row, beta: float) -> Float[Tensor, " metrics"]:
    lengths = torch.tensor([(pair.chosen, pair.rejected) for pair in row.segments], dtype=losses.dtype).to(losses)
    columns = (
        losses,
        beta * ratios.delta,
        (ratios.delta > 0).to(losses),
        beta * ratios.chosen,
        beta * ratios.rejected,
        lengths[:, 0],
        lengths[:, 1],
        ratios.chosen / ratios.chosen_tokens,
        ratios.rejected / ratios.rejected_tokens,
    )
    return torch.stack([column.sum() for column in columns])
