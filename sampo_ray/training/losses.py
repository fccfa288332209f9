"""The preference losses: functions from the pairs of a batch to one loss per pair.

A new loss is one function here and one line in `sampo_ray.config.losses.LOSSES`; docs/method.md has a table of all. In
the docstrings s_w and s_l are sequence log-ratios under the run's reduction, r = beta * s, and Delta = r_w - r_l.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sampo_ray.config.losses import LossSettings, PreferenceLoss
from sampo_ray.training.reduction import SequenceLogRatios
from sampo_ray.training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Float

PerPair: TypeAlias = "Float[Tensor, ' pairs']"


@dataclass(frozen=True)
class ScoredPairs:
    """The pairs of a batch as a loss reads them, in fp32.

    `ratios`: sequence log-ratios under the run's reduction, nats; for a loss without a reference: log-probs.
    `chosen_length`, `rejected_length`: tokens of the whole responses, T_w and T_l.
    `chosen_logprob`, `rejected_logprob`: the policy's mean log-prob of all tokens of a response, nats per token; None
    unless the loss needs these positions.
    `chosen_divergence`, `rejected_divergence`: KL(reference || policy), summed over the tokens that the reduction
    counts, nats; None unless the loss needs the reference's distributions.
    """

    ratios: SequenceLogRatios
    chosen_length: PerPair
    rejected_length: PerPair
    chosen_logprob: PerPair | None = None
    rejected_logprob: PerPair | None = None
    chosen_divergence: PerPair | None = None
    rejected_divergence: PerPair | None = None


def evaluate(loss: PreferenceLoss, pairs: ScoredPairs, settings: LossSettings, statistics: Statistics) -> PerPair:
    """The loss of each pair, [pairs]. ValueError for a loss that returns anything else."""
    function = loss.function
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(module), name)
    losses: Tensor = function(pairs, settings, *([statistics] if loss.statistics else []))
    if losses.shape != pairs.chosen_length.shape:
        raise ValueError(f"the loss returned shape {tuple(losses.shape)}, not one number for each pair")
    return losses


def rewards(pairs: ScoredPairs, settings: LossSettings) -> tuple[PerPair, PerPair]:
    """r_w = beta * s_w and r_l = beta * s_l."""
    return settings.beta * pairs.ratios.chosen, settings.beta * pairs.ratios.rejected


def sigmoid(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(Delta), Delta = beta * (s_w - s_l): DPO (Rafailov et al. 2023), and SamPO with reduction `sample`.

    With label smoothing e it is conservative DPO (Mitchell 2023): -(1 - e) log sigmoid(Delta) - e log sigmoid(-Delta).
    """
    delta = settings.beta * pairs.ratios.delta
    return -(1 - settings.label_smoothing) * logsigmoid(delta) - settings.label_smoothing * logsigmoid(-delta)


def robust(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """(-(1 - e) log sigmoid(Delta) + e log sigmoid(-Delta)) / (1 - 2 e): robust DPO (Chowdhury et al. 2024, arXiv
    2403.00409), unbiased where labels are flipped with probability e.
    """
    delta, e = settings.beta * pairs.ratios.delta, settings.label_smoothing
    return (-(1 - e) * logsigmoid(delta) + e * logsigmoid(-delta)) / (1 - 2 * e)


def hinge(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """max(0, 1 - Delta): SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425) on log-ratios, as in RSO (2309.06657)."""
    return (1 - settings.beta * pairs.ratios.delta).relu()


def ipo(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """(mean r^w - mean r^l - 1/(2 beta))^2: IPO (Azar et al. 2023, Eq. 17), means over the counted tokens."""
    ratios = pairs.ratios
    margin = ratios.chosen / ratios.chosen_tokens - ratios.rejected / ratios.rejected_tokens
    return (margin - 1 / (2 * settings.beta)) ** 2


def dpop(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(Delta - beta * lambda * max(0, -s_w)): DPO-Positive (Pal et al. 2024, arXiv 2402.13228)."""
    fallen = (-pairs.ratios.chosen).relu()  # by how much chosen is less likely than under the reference
    return -logsigmoid(settings.beta * (pairs.ratios.delta - settings.weight * fallen))


def mix(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(Delta) - lambda * (sum_t log pi(y^w_t)) / T_w: DPO and the mean negative log-likelihood of the
    chosen tokens, of all of them under every reduction (Lu et al. 2024, "Hybrid DPO+SFT").
    """
    assert pairs.chosen_logprob is not None, "LOSSES gives `mix` the chosen positions"
    return -logsigmoid(settings.beta * pairs.ratios.delta) - settings.weight * pairs.chosen_logprob


def len_n(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(Delta + lambda * (T_w - T_l)): R-DPO (Park et al. 2024, arXiv 2403.19159); a longer chosen response
    needs a smaller margin, as part of the preference is attributed to its length.
    """
    lengths = pairs.chosen_length - pairs.rejected_length
    return -logsigmoid(settings.beta * pairs.ratios.delta + settings.weight * lengths)


def orpo(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-s_w - beta * log sigmoid(log odds_w - log odds_l), log odds = s - log(1 - e^s): ORPO (Hong et al. 2024, arXiv
    2403.07691, Eqs. 6 and 7), s a response's mean log-prob per token; beta is the paper's lambda.
    """

    def log_odds(s: Tensor) -> Tensor:
        s = s.clamp(max=-1e-7)  # a response of probability 1 has infinite odds, and no gradient
        return s - (-torch.expm1(s)).log()

    chosen, rejected = pairs.ratios.chosen, pairs.ratios.rejected
    return -chosen - settings.beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(beta * (s_w - s_l) - gamma): SimPO (Meng et al. 2024, arXiv 2405.14734, Eq. 6), s mean log-probs."""
    return -logsigmoid(settings.beta * pairs.ratios.delta - settings.margin)


def kto_pair(pairs: ScoredPairs, settings: LossSettings, statistics: Statistics) -> PerPair:
    """1/2 (1 - sigmoid(r_w - z_l)) + 1/2 (1 - sigmoid(z_w - r_l)): KTO (Ethayarajh et al. 2024, arXiv 2402.01306) of a
    pair as two examples of equal weight; z, the reference point of one response, is the mean reward of the other kind
    of response in the last step, at least 0.
    """
    chosen, rejected = rewards(pairs, settings)
    of_chosen, of_rejected = chosen - max(0.0, statistics.rejected), max(0.0, statistics.chosen) - rejected
    return ((-of_chosen).sigmoid() + (-of_rejected).sigmoid()) / 2


def bco_pair(pairs: ScoredPairs, settings: LossSettings, statistics: Statistics) -> PerPair:
    """-log sigmoid(r_w - delta) - log sigmoid(delta - r_l), delta the running mean of all rewards: BCO (Jung et al.
    2024, arXiv 2404.04656), of a pair as two examples.
    """
    chosen, rejected = rewards(pairs, settings)
    return -logsigmoid(chosen - statistics.both) - logsigmoid(statistics.both - rejected)


def sppo_hard(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """(s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2: SPPO (Wu et al. 2024, arXiv 2405.00675, Eq. 4.7), the chosen
    response winning with probability 1; its eta is 1/beta.
    """
    target = 1 / (2 * settings.beta)
    return (pairs.ratios.chosen - target) ** 2 + (pairs.ratios.rejected + target) ** 2


def nca_pair(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l): NCA (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = rewards(pairs, settings)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def tdpo(pairs: ScoredPairs, settings: LossSettings) -> PerPair:
    """-log sigmoid(Delta - lambda * beta * (D_l - D_w)): TDPO2 (Zeng et al. 2024, arXiv 2404.11999), D a
    response's KL(reference || policy) summed over the reduction's tokens (all in the paper); D_w carries no gradient,
    and lambda is the paper's alpha.
    """
    assert pairs.chosen_divergence is not None and pairs.rejected_divergence is not None, "LOSSES gives them"
    divergence = pairs.rejected_divergence - pairs.chosen_divergence.detach()
    return -logsigmoid(settings.beta * (pairs.ratios.delta - settings.weight * divergence))
