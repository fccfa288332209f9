"""What a run asks of itself while it goes on: a probe of each version that ends a round, and what a collapse is."""

from typing import Literal

from pydantic import Field

from sampo_ray.config.section import Section


class CollapseConfig(Section):
    """When a version counts as collapsed, against the version that its round started from. One is enough."""

    win_rate: float = Field(0.4, ge=0, le=0.5)
    """The 95 % interval of its win rate lies below this."""
    growth: float = Field(2.0, gt=1)
    """Its answers have more than this times the mean tokens, or less than one part in it."""
    lost: float = Field(0.5, gt=0, le=1)
    """The share of its answers that are empty, or cut by `max_tokens`, rose above this."""


class EvaluateConfig(Section):
    every: Literal["round", "never"] = "never"
    """`round`: the base and each version that ends a round answer the probe prompts, and are compared."""
    prompts: str | None = None
    """Prompts that are not trained on, in any format of `data.prompts`; those that are also trained on are left out.
    Default: `count` of the prompts of `data.prompts` (online), which the rounds then do without."""
    count: int = Field(64, ge=8, le=4096)
    """Prompts of the probe, at most."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of an answer. Default: `rollout.max_tokens`; offline at most a quarter of `data.max_length`."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; above it answers are sampled with seeds that are the same for all versions."""
    on_collapse: Literal["continue", "stop", "fall back"] = "continue"
    """What follows when a version has collapsed: a note, an error, or the run ends with the version before as its
    final one."""
    collapse: CollapseConfig = CollapseConfig()
