"""Which preference losses and length reductions there are, and what each asks for; importable without torch.

`sampo_ray.training.losses` and `sampo_ray.training.reduction` compute them. A loss from outside this package is named
in the configuration as `package.module:name`: a function of (pairs, settings), or a `PreferenceLoss`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REDUCTIONS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "average": (),
    "mean": (),
    "sample": (),
    "top_k": (),
    "ld": ("alpha",),
}
"""Length reductions, and the fields of `method` that each one needs."""

Positions = Literal["reduction", "chosen", "all"]
FromReference = Literal["log-probs", "nothing", "distributions"]


@dataclass(frozen=True)
class LossSettings:
    """What a loss may depend on besides the pairs; fields of `method`, 0 where the loss does not use one."""

    beta: float
    label_smoothing: float = 0.0
    weight: float = 0.0
    margin: float = 0.0


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it asks of the stages before it.

    `function`: called with (ScoredPairs, LossSettings), and with Statistics where `statistics` says so; or where it is,
    as `package.module:name`, if importing it is left to those who call it.
    `settings`: the fields of LossSettings that it uses besides beta, with defaults; beta too, where that is not 0.1.
    `positions`: the tokens whose log-probs it reads: those of the `reduction`, all of the `chosen` besides, or `all`.
    `reference`: what it needs of the reference: its token `log-probs`, `nothing`, or besides the log-probs its
    `distributions` over the vocabulary, for which it must be resident where the policy is.
    `reductions`: the length reductions it can be combined with.
    """

    function: Callable[..., Any] | str
    settings: Mapping[str, float] = field(default_factory=dict)
    positions: Positions = "reduction"
    reference: FromReference = "log-probs"
    reductions: tuple[str, ...] = tuple(REDUCTIONS)
    statistics: bool = False


def _own(
    function: str,
    settings: Mapping[str, float] | None = None,
    positions: Positions = "reduction",
    reference: FromReference = "log-probs",
    reductions: tuple[str, ...] = tuple(REDUCTIONS),
    statistics: bool = False,
) -> PreferenceLoss:
    place = f"sampo_ray.training.losses:{function}"
    return PreferenceLoss(place, settings or {}, positions, reference, reductions, statistics)


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _own("sigmoid", {"label_smoothing": 0.0}),
    "robust": _own("robust", {"label_smoothing": 0.1}),
    "hinge": _own("hinge"),
    "ipo": _own("ipo"),
    "dpop": _own("dpop", {"weight": 50.0}),
    "mix": _own("mix", {"weight": 1.0}, positions="chosen"),
    "lenN": _own("len_n", {"weight": 0.01}),
    "orpo": _own("orpo", reference="nothing", reductions=("mean",)),
    "simpo": _own("simpo", {"beta": 2.5, "margin": 1.4}, reference="nothing", reductions=("mean",)),
    "kto_pair": _own("kto_pair", statistics=True),
    "bco_pair": _own("bco_pair", statistics=True),
    "sppo_hard": _own("sppo_hard"),
    "nca_pair": _own("nca_pair"),
    "tdpo": _own(
        "tdpo",
        {"weight": 0.5},
        reference="distributions",
        reductions=("sum", "sample"),  # D is a sum over the tokens that they count
    ),
}


REFUSED = {"ld_dpo": "is loss='sigmoid' with reduction='ld'"}
"""Names that somebody will look for, and why they are no losses here."""


def find_loss(name: str) -> PreferenceLoss:
    """The loss of that name in LOSSES, or at `package.module:name` a PreferenceLoss or a function of (pairs, settings).

    Raises ValueError when there is none that could be called.
    """
    if name in LOSSES:
        return LOSSES[name]
    if name in REFUSED:
        raise ValueError(f"loss={name!r} {REFUSED[name]}")
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
