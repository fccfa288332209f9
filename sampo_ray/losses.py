"""The preference-loss family: plain functions from sequence log-ratios to one loss a pair.

A new loss is one function and one line in `LOSSES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from sampo_ray.reduction import REDUCTIONS, SequenceLogRatios


@dataclass(frozen=True)
class LossSettings:
    """What a loss may depend on besides the pairs: the strength beta, and the probability of a wrong label."""

    beta: float
    label_smoothing: float = 0.0


def sigmoid(ratios: SequenceLogRatios, settings: LossSettings) -> Float[Tensor, " pairs"]:
    """-log sigmoid(Delta), Delta = beta * (s_w - s_l): DPO (Rafailov et al. 2023), and SamPO with reduction `sample`.

    With label smoothing e it is conservative DPO (Mitchell 2023): -(1 - e) log sigmoid(Delta) - e log sigmoid(-Delta).
    """
    delta = settings.beta * ratios.delta
    return -(1 - settings.label_smoothing) * logsigmoid(delta) - settings.label_smoothing * logsigmoid(-delta)


def ipo(ratios: SequenceLogRatios, settings: LossSettings) -> Float[Tensor, " pairs"]:
    """(mean r^w - mean r^l - 1/(2 beta))^2: IPO (Azar et al. 2023, Eq. 17), log-ratios averaged over the counted
    tokens.
    """
    margin = ratios.chosen / ratios.chosen_tokens - ratios.rejected / ratios.rejected_tokens
    return (margin - 1 / (2 * settings.beta)) ** 2


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it asks of the stages before it.

    `positions`: the tokens whose log-probs it reads: those of the `reduction`, all of the `chosen`, or `all`.
    `reference`: what it needs of the reference: its token `log-probs`, the `model` itself, or `nothing`.
    `reductions`: the length reductions it can be combined with. `smoothing`: whether label smoothing means something.
    """

    function: Callable[[SequenceLogRatios, LossSettings], Float[Tensor, " pairs"]]
    positions: Literal["reduction", "chosen", "all"] = "reduction"
    reference: Literal["log-probs", "model", "nothing"] = "log-probs"
    reductions: tuple[str, ...] = tuple(REDUCTIONS)
    smoothing: bool = False


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, smoothing=True),
    "ipo": PreferenceLoss(ipo),
}
