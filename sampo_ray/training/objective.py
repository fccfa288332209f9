"""One row's contribution to a training step: losses of its pairs, and the sums that metrics are made of. No Ray, no
DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sampo_ray.config.losses import REDUCTIONS as REDUCTION_SETTINGS
from sampo_ray.config.losses import LossSettings, PreferenceLoss, find_loss
from sampo_ray.training.batching import Pair, Row, assemble
from sampo_ray.training.losses import ScoredPairs, evaluate
from sampo_ray.training.policy import Ask, Reference, Sides, every_token, pair_divergences, pair_logprobs
from sampo_ray.training.reduction import REDUCTIONS, MaskKey, Positions, Reduction, reduce_pairs
from sampo_ray.training.statistics import Statistics
from sampo_ray.training.streams import Stream

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from sampo_ray.config.method import MethodConfig
    from sampo_ray.config.run import RunConfig


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
    """What the configuration asks to be minimised."""
    return Objective(
        find_loss(method.loss),
        LossSettings(method.beta, method.label_smoothing or 0.0, method.weight or 0.0, method.margin or 0.0),
        REDUCTIONS[method.reduction],
        {name: getattr(method, name) for name in REDUCTION_SETTINGS[method.reduction]},
        method.mask == "shared",
    )


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
nats. Of a loss without a reference s is a log-prob, and so are the two `logratio_per_token`.
"""

WHOLE_SIDES = {"reduction": 0, "chosen": 1, "all": 2}
"""Of how many sides (chosen, then rejected) a loss wants log-probs of all tokens, by its `positions`."""

SIDES = ("chosen", "rejected")
IDLE_PAIR = Pair("", *[np.zeros(1, np.int32)] * 3)


@dataclass(frozen=True)
class Draw:
    """Which epoch of which round of a run this is: with the pair's id, all that a token mask depends on."""

    seed: int
    round: int
    epoch: int


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
class Sampled:
    """Asks for the tokens that a round's masks keep in any of its epochs (an `Ask`)."""

    objective: Objective
    seed: int
    round: int
    epochs: int

    def __call__(self, pairs: Sequence[Pair]) -> list[Positions]:
        draws = [Draw(self.seed, self.round, epoch) for epoch in range(self.epochs)]
        kept = zip(*(row_positions(self.objective, draw, pairs)[1] for draw in draws), strict=True)
        return [
            Positions(
                np.unique(np.concatenate([at.chosen for at in epochs])),
                np.unique(np.concatenate([at.rejected for at in epochs])),
            )
            for epochs in kept
        ]


def asked_of_reference(config: RunConfig, round: int) -> Ask:
    """Of which tokens the round's reference gives log-probs."""
    if config.reference.positions == "all":
        return every_token
    return Sampled(objective_of(config.method), config.run.seed, round, config.rounds.epochs)


def row_losses(
    policy: nn.Module,
    row: Row,
    pairs: Sequence[Pair],
    objective: Objective,
    draw: Draw,
    before: Statistics,
    reference: Reference | None = None,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " metrics"]]:
    """Losses of a row's pairs, at least one, and the sums over them of METRICS (detached, fp32).

    For a loss that needs stored log-probs the pairs have some; `before` tells of earlier steps; `reference` must be
    there for a loss that asks for its distributions.
    """
    scored = score_row(policy, row, pairs, objective, draw, reference)
    losses = evaluate(objective.loss, scored, objective.settings, before)
    return losses, _sums(losses, scored, objective.settings.beta)


def accumulate(
    policy: nn.Module,
    rows: Sequence[Int64[np.ndarray, " pairs"]],
    pairs: Sequence[Pair],
    objective: Objective,
    draw: Draw,
    before: Statistics,
    weight: float,
    reference: Reference | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> tuple[Float[Tensor, " metrics"], list[tuple[list[Pair], Tensor]]]:
    """Rows forward and backward: adds to the gradients that of `weight` times the sum of the losses of their pairs.

    Returns the sums of METRICS, and each row's pairs with their losses. `rows` are indices into `pairs`; an empty one,
    that only other ranks have, adds zeros.
    """
    device = next(policy.parameters()).device
    sums, done = torch.zeros(len(METRICS), device=device), []
    for indices in rows:
        if len(indices):
            mine = [pairs[index] for index in indices]
            losses, row_sums = row_losses(policy, assemble(mine).to(device), mine, objective, draw, before, reference)
            sums += row_sums
            done.append((mine, losses.detach()))
            backward(losses.sum() * weight)
        else:
            backward(idle_loss(policy, device))
    return sums, done


def score_row(
    policy: nn.Module,
    row: Row,
    pairs: Sequence[Pair],
    objective: Objective,
    draw: Draw,
    reference: Reference | None = None,
) -> ScoredPairs:
    """A row's pairs as the loss wants to see them."""
    loss = objective.loss
    lengths = [(pair.chosen, pair.rejected) for pair in row.segments]
    positions, reference_positions = row_positions(objective, draw, pairs)
    asked = asked_positions(loss, positions, lengths)
    # What the device is to be told goes there first: later the copies would wait for the forward pass.
    tokens = torch.tensor(lengths).to(row.tokens.device)
    theirs, divergences = list[list[Tensor]](), list[Tensor]()
    if loss.reference == "log-probs":
        theirs = [_stored(pairs, reference_positions, side, row.tokens.device) for side in SIDES]
    if loss.reference == "distributions":
        assert reference is not None, "checked where the learner begins a round"
        sides, resident, by_token = pair_divergences(policy, reference, row, asked)
        theirs = _counted(resident, positions)
        divergences = [torch.stack([each.sum() for each in side]) for side in _counted(by_token, positions)]
    else:
        sides = pair_logprobs(policy, row, asked)
    reduced = _counted(sides, positions)
    if theirs:
        both = zip(reduced, theirs, strict=True)
        reduced = [[p - ref.to(p) for p, ref in zip(*side, strict=True)] for side in both]
    ratios = reduce_pairs(objective.reduction, reduced[0], reduced[1], lengths, **objective.reduced_with)
    whole = [torch.stack([p.mean() for p in logprobs]) for logprobs in sides[: WHOLE_SIDES[loss.positions]]]
    named = dict(zip(("chosen_logprob", "rejected_logprob"), whole, strict=False))
    named |= zip(("chosen_divergence", "rejected_divergence"), divergences, strict=False)
    tokens = tokens.to(ratios.chosen)
    return ScoredPairs(ratios, tokens[:, 0], tokens[:, 1], **named)


def asked_positions(
    loss: PreferenceLoss, reduction: list[Positions], lengths: list[tuple[int, int]]
) -> list[Positions]:
    """The positions of each pair that the policy needs logits at: the reduction's, and whole responses if asked for."""
    whole = WHOLE_SIDES[loss.positions]
    return [
        Positions(np.arange(w) if whole > 0 else at.chosen, np.arange(r) if whole > 1 else at.rejected)
        for at, (w, r) in zip(reduction, lengths, strict=True)
    ]


def _stored(pairs: Sequence[Pair], positions: list[Positions], side: str, device: torch.device) -> list[Tensor]:
    """The reference's log-probs at those positions of each pair; in one copy to the device."""
    kept = [getattr(pair, f"{side}_ref")[getattr(at, side)] for pair, at in zip(pairs, positions, strict=True)]
    return list(torch.from_numpy(np.concatenate(kept)).to(device).split([len(each) for each in kept]))


def _counted(values: Sides, positions: list[Positions]) -> list[list[Tensor]]:
    """Of both sides' numbers of asked tokens those of the tokens that the reduction counts."""
    both = zip(values, SIDES, strict=True)
    return [[_at(x, getattr(at, side)) for x, at in zip(each, positions, strict=True)] for each, side in both]


def _at(values: Float[Tensor, " asked"], kept: np.ndarray) -> Float[Tensor, " kept"]:
    return values if len(values) == len(kept) else values[torch.from_numpy(kept).to(values.device)]


def idle_loss(policy: nn.Module, device: torch.device) -> Tensor:
    """A rank's part in a row that only others have: exactly zero, with a gradient of zeros for every parameter.

    A parameter without a gradient would take no part in the reduction, and the ranks would mismatch.
    """
    row = assemble([IDLE_PAIR]).to(device)
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
