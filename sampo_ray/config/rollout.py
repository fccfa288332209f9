"""`rounds`, `rollout` and `reward`: where a round's pairs come from."""

from typing import Literal

from pydantic import Field, model_validator

from sampo_ray.config.base import Section


class RoundsConfig(Section):
    count: int = Field(3, ge=1)
    """How many rounds; each starts from, and is held to, the policy of the one before."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` trains on `data.train`; `online` samples and scores completions for `data.prompts`."""
    epochs: int = Field(1, ge=1)
    """Passes over a round's pairs."""
    data: Literal["all", "split"] = "all"
    """Offline: every round sees all pairs, or each its own share of them."""


class RolloutConfig(Section):
    prompts: int | None = Field(None, ge=1)
    """Prompts a round (online). Default: all of `data.prompts`, split evenly over the rounds."""
    samples: int = Field(4, ge=1)
    """Completions a prompt; the best is paired with the worst."""
    temperature: float = Field(0.8, gt=0)
    """Sampling temperature."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus mass."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens of a completion, at most; one cut by this is never chosen."""
    ahead: Literal[0, 1] = 0
    """Rounds whose completions are drawn before their policy is there: 1 overlaps the drawing with the training of the
    round before. They are then off-policy by at most that round's steps, and differ from run to run."""


class RewardConfig(Section):
    function: str | None = None
    """`package.module:function` or `file.py:function`; called with (prompts, completions), returns one float each."""
    model: str | None = None
    """Folder or hub name of a Hugging Face sequence-classification reward model."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds one scoring call may take."""
    retries: int = Field(3, ge=0)
    """Further tries of a failed call, with backoff, before its completions are dropped."""

    @model_validator(mode="after")
    def _one_source(self) -> "RewardConfig":
        if self.function and self.model:
            raise ValueError("both function and model are set; keep one reward source")
        return self
