"""The preference losses and length reductions that a configuration may name, and what each needs; without torch.

`sampo_ray.training.losses` and `sampo_ray.training.reduction` compute them. A user's loss is named in the configuration
as `package.module:name`: a function of (pairs, settings), or a `PreferenceLoss`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sampo_ray.errors import suggestion

if TYPE_CHECKING:
    from torch import Tensor

REDUCTIONS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "average": (),
    "mean": (),
    "sample": (),
    "top_k": (),
    "ld": ("alpha",),
}
"""Length reductions, and the fields of `method` that each needs."""

Positions = Literal["reduction", "chosen", "all"]
FromReference = Literal["log-probs", "nothing", "distributions"]


@dataclass(frozen=True)
class LossSettings:
    """The fields of `method` that a loss may use; 0 for those that it does not use."""

    beta: float
    label_smoothing: float = 0.0
    weight: float = 0.0
    margin: float = 0.0


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it needs from the stages before it.

    `function`: called with (ScoredPairs, LossSettings), and with Statistics if `statistics` is true; or its name, as
    `package.module:name`, which is imported at the first call.
    `settings`: the fields of LossSettings that it uses, with defaults; beta only if its default is not 0.1.
    `positions`: the tokens whose log-probs it reads: those of the `reduction`, also all `chosen` tokens, or `all`.
    `reference`: what it needs of the reference: its token `log-probs`, `nothing`, or also its `distributions` over the
    vocabulary, for which the reference must be in the policy's process.
    `reductions`: the length reductions it can be combined with.
    """

    function: Callable[..., Tensor] | str
    settings: Mapping[str, float] = field(default_factory=dict)
    positions: Positions = "reduction"
    reference: FromReference = "log-probs"
    reductions: tuple[str, ...] = tuple(REDUCTIONS)
    statistics: bool = False


_BUILT_IN = "sampo_ray.training.losses:"
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(_BUILT_IN + "sigmoid", {"label_smoothing": 0.0}),
    "robust": PreferenceLoss(_BUILT_IN + "robust", {"label_smoothing": 0.1}),
    "hinge": PreferenceLoss(_BUILT_IN + "hinge"),
    "ipo": PreferenceLoss(_BUILT_IN + "ipo"),
    "dpop": PreferenceLoss(_BUILT_IN + "dpop", {"weight": 50.0}),
    "mix": PreferenceLoss(_BUILT_IN + "mix", {"weight": 1.0}, positions="chosen"),
    "lenN": PreferenceLoss(_BUILT_IN + "len_n", {"weight": 0.01}),
    "orpo": PreferenceLoss(_BUILT_IN + "orpo", reference="nothing", reductions=("mean",)),
    "simpo": PreferenceLoss(
        _BUILT_IN + "simpo", {"beta": 2.5, "margin": 1.4}, reference="nothing", reductions=("mean",)
    ),
    "kto_pair": PreferenceLoss(_BUILT_IN + "kto_pair", statistics=True),
    "bco_pair": PreferenceLoss(_BUILT_IN + "bco_pair", statistics=True),
    "sppo_hard": PreferenceLoss(_BUILT_IN + "sppo_hard"),
    "nca_pair": PreferenceLoss(_BUILT_IN + "nca_pair"),
    "tdpo": PreferenceLoss(
        _BUILT_IN + "tdpo",
        {"weight": 0.5},
        reference="distributions",
        reductions=("sum", "sample"),  # D is a sum over the tokens that they count
    ),
}
_OWN = "it is not built in, and can be a loss of your own (docs/method.md)"
_NOT_PAIRS = (
    "it is no preference loss; rounds.mode=online makes pairs of scored samples, for any loss of docs/method.md"
)
ADVICE = {
    **dict.fromkeys(("dpo", "iterative_dpo"), "use method.loss=sigmoid method.reduction=sum"),
    "sampo": "use method.loss=sigmoid method.reduction=sample, which are the defaults",
    "cdpo": "use method.loss=sigmoid method.reduction=sum method.label_smoothing=0.1",
    "ld_dpo": "use method.loss=sigmoid method.reduction=ld method.alpha=...",
    "sigmoid_norm": "use method.loss=sigmoid method.reduction=mean",
    "rpo": "use method.loss=mix method.reduction=sum",
    "rdpo": "use method.loss=lenN (R-DPO, against length) or method.loss=robust (rDPO, against wrong labels)",
    "r_dpo": "use method.loss=lenN method.reduction=sum",
    "robust_dpo": "use method.loss=robust method.reduction=sum",
    "dpo_positive": "use method.loss=dpop method.reduction=sum",
    **dict.fromkeys(("slic", "slic_hf", "rso"), "use method.loss=hinge method.reduction=sum"),
    "kto": "use method.loss=kto_pair method.reduction=sum",
    "bco": "use method.loss=bco_pair method.reduction=sum",
    "nca": "use method.loss=nca_pair method.reduction=sum",
    "sppo": "use method.loss=sppo_hard method.reduction=sum method.beta=0.001",
    "tdpo2": "use method.loss=tdpo method.reduction=sum",
    **dict.fromkeys(("cpo", "alphapo", "tpo", "tpo_l"), "it is not built in; simpo and orpo need no reference either"),
    **dict.fromkeys(("sft", "nll"), "it is no preference loss; method.loss=mix adds it to DPO's"),
    **dict.fromkeys(("apo", "apo_zero", "apo_down", "exo", "exo_pair", "discopop", "tdpo1"), _OWN),
    **dict.fromkeys(("aot", "aot_pair", "aot_unpaired"), "it sorts a batch, and a loss here is of one pair at a time"),
    **dict.fromkeys(("grpo", "ppo", "rloo"), _NOT_PAIRS),
    "online_dpo": "use rounds.mode=online method.loss=sigmoid method.reduction=sum",
    **dict.fromkeys(("apo_zero_unpaired", "kto_unpaired"), "it is for single answers; losses here are of pairs"),
}
"""What to do about names that losses have elsewhere, in papers and in TRL."""


def advice(name: str) -> str:
    """What to do about a loss's `name` that is not in LOSSES."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    known = {each.lower(): each for each in LOSSES}
    return ADVICE.get(plain) or (f"did you mean {known[plain]!r}?" if plain in known else suggestion(name, LOSSES))


def find_loss(name: str) -> PreferenceLoss:
    """The loss of that name in LOSSES, or the PreferenceLoss or function of (pairs, settings) at `package.module:name`.

    Raises ValueError when there is none, or it cannot be called.
    """
    if name in LOSSES:
        return LOSSES[name]
    place, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(place), attribute)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(
            f"loss={name!r}: importing it failed with {type(error).__name__}: {error}; name a package.module:function "
            "that can be imported here and on the trainer's machines"
        ) from error
    loss = found if isinstance(found, PreferenceLoss) else PreferenceLoss(found)
    if unknown := set(loss.settings) - {each.name for each in dataclasses.fields(LossSettings)}:
        raise ValueError(f"loss={name!r}: asks for {', '.join(sorted(unknown))}, which is no setting of LossSettings")
    if isinstance(loss.function, str):
        return loss
    try:
        inspect.signature(loss.function).bind(*["pairs", "settings", "statistics"][: 2 + loss.statistics])
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss={name!r}: cannot be called with (pairs, settings): {error}") from None
    return loss
