"""`method`: the preference loss and the length reduction."""

from typing import Literal

from pydantic import Field, model_validator

from sampo_ray.config.base import Section, suggestion
from sampo_ray.config.losses import LOSSES, REDUCTIONS, REFUSED, find_loss


class MethodConfig(Section):
    loss: str = "sigmoid"
    """Preference loss: a name from docs/method.md, or `package.module:function`."""
    reduction: str = "sample"
    """Length reduction of token log-ratios: sum (DPO), average, mean, sample (SamPO), top_k or ld (LD-DPO). Default:
    sample; mean where the loss is one of mean log-probs (orpo, simpo)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference; lambda of orpo. Default: 0.1, simpo 2.5."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """Probability that a preference label is wrong. Default: sigmoid 0 (above it is conservative DPO), robust 0.1."""
    weight: float | None = Field(None, ge=0)
    """The loss's lambda. Default: dpop 50, mix 1 (nats a token), lenN 0.01 (a token), tdpo 0.5 (its alpha)."""
    margin: float | None = Field(None, ge=0)
    """By how much rewards are to differ. Default: simpo 1.4, for Llama-3-8B (elsewhere 0.3)."""
    alpha: float | None = Field(None, ge=0, le=1)
    """reduction=ld: how much tokens beyond the length of the shorter response count. No default: tuned for a model."""
    mask: Literal["shared", "independent"] = "shared"
    """Whether policy and reference sum the same sampled positions, or draw twice as the authors' code does."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs that are stored before a round's first step."""
        return find_loss(self.loss).reference == "log-probs"

    @property
    def needs_distributions(self) -> bool:
        """Whether training keeps the reference beside the policy."""
        return find_loss(self.loss).reference == "distributions"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, given: object) -> object:
        if not isinstance(given, dict) or not isinstance(name := given.get("loss", "sigmoid"), str):
            return given
        if name not in {**LOSSES, **REFUSED} and ":" not in name:
            raise ValueError(f"loss={name!r} is not known; {suggestion(name, LOSSES)}")
        loss = find_loss(name)
        reduction = "sample" if "sample" in loss.reductions else loss.reductions[0]
        defaults = {"reduction": reduction, **loss.settings}
        return {**given, **{key: value for key, value in defaults.items() if given.get(key) is None}}

    @model_validator(mode="after")
    def _compatible(self) -> "MethodConfig":
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not known; {suggestion(self.reduction, REDUCTIONS)}")
        loss = find_loss(self.loss)
        if self.reduction not in loss.reductions:
            raise ValueError(
                f"loss={self.loss!r} cannot be combined with reduction={self.reduction!r}; "
                f"use reduction: {' or '.join(loss.reductions)}"
            )
        for name in ("label_smoothing", "weight", "margin"):
            if (value := getattr(self, name)) is not None and name not in loss.settings:
                raise ValueError(f"loss={self.loss!r} has no {name}; drop {name}={value}")
        if (self.alpha is None) == ("alpha" in REDUCTIONS[self.reduction]):
            raise ValueError(f"alpha={self.alpha} with reduction={self.reduction!r}: ld needs it, others have none")
        if self.mask == "independent" and not (self.reduction == "sample" and self.needs_reference):
            raise ValueError(
                "mask='independent' is for reduction='sample' and stored log-probs of a reference; "
                f"not {self.reduction!r}, {self.loss!r}"
            )
        return self
