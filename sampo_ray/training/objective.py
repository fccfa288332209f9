"""The losses of a row's pairs, the sums that metrics are made of, and a train step on one device. No DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sampo_ray.config.losses import REDUCTIONS as REDUCTION_SETTINGS
from sampo_ray.config.losses import LossSettings, PreferenceLoss, find_loss
from sampo_ray.training.batching import Pair, Pairs, Row, Step, assemble
from sampo_ray.training.losses import ScoredPairs, evaluate
from sampo_ray.training.policy import every_token, pair_divergences, pair_logprobs
from sampo_ray.training.reduction import REDUCTIONS, MaskKey, Positions, Reduction, reduce_pairs
from sampo_ray.training.statistics import Statistics
from sampo_ray.training.streams import Stream

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from sampo_ray.config.run import RunConfig
    from sampo_ray.config.sections import MethodConfig
    from sampo_ray.training.policy import PairValues, Policy, Reference, SelectPositions

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
nats. For a loss without a reference s is a log-prob, and so are the two `logratio_per_token`."""

RESPONSES = ("chosen", "rejected")
WHOLE_RESPONSES = {"reduction": 0, "chosen": 1, "all": 2}
"""How many of RESPONSES a loss needs the log-probs of all tokens of, by its `positions`."""


@dataclass(frozen=True)
class Objective:
    """What training minimises: a loss of the sequence log-ratios that a length reduction makes.

    `reduced_with`: the reduction's own settings. `shared_mask`: whether the policy and its reference are summed over
    the same token positions (Eq. 10 of the paper), or over two draws, as in the authors' code.
    """

    loss: PreferenceLoss
    settings: LossSettings
    reduction: Reduction
    reduced_with: Mapping[str, float] = field(default_factory=dict)
    shared_mask: bool = True


def objective_of(method: MethodConfig) -> Objective:
    """The objective that a configuration describes."""
    return Objective(
        find_loss(method.loss),
        LossSettings(method.beta, method.label_smoothing or 0.0, method.weight or 0.0, method.margin or 0.0),
        REDUCTIONS[method.reduction],
        {name: getattr(method, name) for name in REDUCTION_SETTINGS[method.reduction]},
        method.mask == "shared",
    )


@dataclass(frozen=True)
class Draw:
    """The part of a MaskKey that all pairs of a step share: the run's seed, the round and the epoch."""

    seed: int
    round: int
    epoch: int


@dataclass(frozen=True)
class LossInputs:
    """What the losses of a step depend on besides the policy and the pairs.

    `statistics`: of earlier steps of the round. `reference`: required by losses that need its distributions.
    """

    objective: Objective
    draw: Draw
    statistics: Statistics = field(default_factory=Statistics)
    reference: Reference | None = None


def row_positions(objective: Objective, draw: Draw, pairs: Sequence[Pair]) -> tuple[list[Positions], list[Positions]]:
    """The token positions of each pair that the policy, and that the reference, is summed over."""
    positions = objective.reduction.positions
    policy, reference = [], []
    for pair in pairs:
        key = MaskKey(draw.seed, draw.round, draw.epoch, pair.id)
        lengths = len(pair.chosen), len(pair.rejected)
        policy.append(positions(key, *lengths))
        reference.append(policy[-1] if objective.shared_mask else positions(key, *lengths, Stream.REFERENCE_MASK))
    return policy, reference


@dataclass(frozen=True)
class MaskedPositions:
    """Selects the tokens that the reference's masks keep in any epoch of a round (a `SelectPositions`)."""

    objective: Objective
    seed: int
    round: int
    epochs: int

    def __call__(self, pairs: Sequence[Pair]) -> list[Positions]:
        draws = [Draw(self.seed, self.round, epoch) for epoch in range(self.epochs)]
        kept = zip(*(row_positions(self.objective, draw, pairs)[1] for draw in draws), strict=True)
        return [
            Positions(*(np.unique(np.concatenate([getattr(at, name) for at in epochs])) for name in RESPONSES))
            for epochs in kept
        ]


def reference_positions(config: RunConfig, round: int) -> SelectPositions:
    """Selects the tokens that the round's reference is to score."""
    if config.reference.positions == "all":
        return every_token
    return MaskedPositions(objective_of(config.method), config.run.seed, round, config.rounds.epochs)


def accumulate(
    policy: nn.Module,
    rows: Sequence[Int64[np.ndarray, " pairs"]],
    pairs: Pairs,
    inputs: LossInputs,
    weight: float,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> tuple[Float[Tensor, " metrics"], list[tuple[list[Pair], Tensor]]]:
    """Forward and backward passes of rows: adds the gradients of `weight` times the sum of their pairs' losses.

    Returns the sums of METRICS, and each row's pairs with their losses. `rows` are indices into `pairs`; a row is empty
    where only other ranks have one, and adds zeros.
    """
    device = next(policy.parameters()).device
    sums, done = torch.zeros(len(METRICS), device=device), []
    for indices in rows:
        if len(indices):
            row_pairs = [pairs[index] for index in indices]
            losses, row_sums = row_losses(policy, assemble(row_pairs).to(device), row_pairs, inputs)
            sums += row_sums
            done.append((row_pairs, losses.detach()))
            backward(losses.sum() * weight)
        else:
            backward(zero_loss(policy, device))
    return sums, done


def row_losses(
    policy: nn.Module, row: Row, pairs: Sequence[Pair], inputs: LossInputs
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " metrics"]]:
    """Losses of a row's pairs, at least one, and the sums over them of METRICS (detached, fp32)."""
    objective = inputs.objective
    scored = _score_row(policy, row, pairs, inputs)
    losses = evaluate(objective.loss, scored, objective.settings, inputs.statistics)
    return losses, _sums(losses, scored, objective.settings.beta)


def _score_row(policy: nn.Module, row: Row, pairs: Sequence[Pair], inputs: LossInputs) -> ScoredPairs:
    objective, device = inputs.objective, row.tokens.device
    lengths = [(pair.chosen, pair.rejected) for pair in row.segments]
    positions, of_reference = row_positions(objective, inputs.draw, pairs)
    selected = _logit_positions(objective.loss, positions, lengths)
    # All copies to the device come first: after the forward pass they would wait for it.
    tokens = torch.tensor(lengths).to(device)
    references, divergences = list[list[Tensor]](), list[Tensor]()
    if objective.loss.reference == "log-probs":
        references = [_stored(pairs, of_reference, response, device) for response in RESPONSES]
    if objective.loss.reference == "distributions":
        assert inputs.reference is not None, "checked where the learner begins a round"
        logprobs, reference_logprobs, by_token = pair_divergences(policy, inputs.reference, row, selected)
        references = _counted(reference_logprobs, positions)
        divergences = [torch.stack([each.sum() for each in values]) for values in _counted(by_token, positions)]
    else:
        logprobs = pair_logprobs(policy, row, selected)
    ratios = _counted(logprobs, positions)
    if references:
        both = zip(ratios, references, strict=True)
        ratios = [[p - ref.to(p) for p, ref in zip(*each, strict=True)] for each in both]
    reduced = reduce_pairs(objective.reduction, ratios[0], ratios[1], lengths, **objective.reduced_with)
    whole = logprobs[: WHOLE_RESPONSES[objective.loss.positions]]
    means = [torch.stack([p.mean() for p in values]) for values in whole]
    optional = dict(zip(("chosen_logprob", "rejected_logprob"), means, strict=False))
    optional |= zip(("chosen_divergence", "rejected_divergence"), divergences, strict=False)
    tokens = tokens.to(reduced.chosen)
    return ScoredPairs(reduced, tokens[:, 0], tokens[:, 1], **optional)


def _logit_positions(
    loss: PreferenceLoss, reduction: list[Positions], lengths: list[tuple[int, int]]
) -> list[Positions]:
    """The positions at which the policy computes logits: the reduction's, or whole responses if the loss needs them."""
    whole = WHOLE_RESPONSES[loss.positions]
    return [
        Positions(np.arange(w) if whole > 0 else at.chosen, np.arange(r) if whole > 1 else at.rejected)
        for at, (w, r) in zip(reduction, lengths, strict=True)
    ]


def _stored(pairs: Sequence[Pair], positions: list[Positions], response: str, device: torch.device) -> list[Tensor]:
    """The reference's log-probs at those positions of each pair, in one copy to the device."""
    kept = [getattr(pair, f"{response}_ref")[getattr(at, response)] for pair, at in zip(pairs, positions, strict=True)]
    return list(torch.split(torch.from_numpy(np.concatenate(kept)).to(device), [len(each) for each in kept]))


def _counted(values: PairValues, positions: list[Positions]) -> list[list[Tensor]]:
    """Of values at the selected tokens those at the tokens that the reduction counts."""
    both = zip(values, RESPONSES, strict=True)
    return [[_at(x, getattr(at, name)) for x, at in zip(each, positions, strict=True)] for each, name in both]


def _at(values: Float[Tensor, " selected"], kept: np.ndarray) -> Float[Tensor, " kept"]:
    return values if len(values) == len(kept) else values[torch.from_numpy(kept).to(values.device)]


def zero_loss(policy: nn.Module, device: torch.device) -> Tensor:
    """Exactly zero, with a gradient of zeros for every parameter: a rank's part in a row that only other ranks have.

    A parameter without a gradient would take no part in the reduction, and the ranks would mismatch.
    """
    row = assemble([Pair("", *[np.zeros(1, np.int32)] * 3)]).to(device)
    chosen, _ = pair_logprobs(policy, row, [Positions(np.zeros(1, np.int64), np.zeros(1, np.int64))])
    return chosen[0].sum() * 0.0


@torch.no_grad()
def _sums(losses: Tensor, scored: ScoredPairs, beta: float) -> Float[Tensor, " metrics"]:
    ratios = scored.ratios
    columns = (
        losses,
        beta * ratios.delta,
        (ratios.delta > 0).to(losses),
        beta * ratios.chosen,
        beta * ratios.rejected,
        scored.chosen_length,
        scored.rejected_length,
        ratios.chosen / ratios.chosen_tokens,
        ratios.rejected / ratios.rejected_tokens,
    )
    return torch.stack([column.sum() for column in columns])


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
    """The learner's arithmetic, for one rank, with torch and transformers alone: for measurements and as a check on it.

    Returns METRICS and `grad_norm`, and the statistics for the next step. Values that are not finite stay so.
    """
    [rows] = step.rows
    sums, _ = accumulate(policy, rows, pairs, inputs, 1 / step.pairs)
    norm = weights.step(learning_rate, max_grad_norm)
    metrics = dict(zip(METRICS, (sums / step.pairs).tolist(), strict=True))
    return metrics | {"grad_norm": float(norm)}, inputs.statistics.after(metrics, step.pairs)
