"""The configuration of a run: one pydantic tree (`sampo_ray.config.recipe` reads it).

It refuses every mistake that can be found before an engine starts, with one message that names field, value and fix.
The profile (`sampo_ray.config.profiles`) fills fields that are `None`.
"""

from typing import Literal

from pydantic import Field, model_validator

from sampo_ray.config.base import Section
from sampo_ray.config.data import DataConfig
from sampo_ray.config.fleet import FleetsConfig
from sampo_ray.config.method import MethodConfig
from sampo_ray.config.model import ModelConfig
from sampo_ray.config.rollout import RewardConfig, RolloutConfig, RoundsConfig
from sampo_ray.config.rows import RowBudget, default_row
from sampo_ray.config.serve import PublishConfig, ServeConfig
from sampo_ray.config.training import OptimConfig, ReferenceConfig, TrainerConfig


class OutputConfig(Section):
    dir: str
    """Run directory: a local path or any fsspec URL; everything a run produces is in it."""
    seed: int = Field(0, ge=0)
    """Seeds data order, masks and sampling."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Metric trackers besides TensorBoard, which is always written."""
    export_dtype: Literal["float16", "bfloat16"] = "float16"
    """Data type of the exported Hugging Face folders."""


class RunConfig(Section):
    """A whole run. `profile: auto` chooses between `laptop` and `cluster` by the GPUs that Ray has."""

    profile: Literal["auto", "laptop", "cluster"] = "auto"
    model: ModelConfig
    data: DataConfig = DataConfig()
    rounds: RoundsConfig = RoundsConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    reference: ReferenceConfig = ReferenceConfig()
    trainer: TrainerConfig = TrainerConfig()
    fleet: FleetsConfig = FleetsConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = Field(default_factory=ServeConfig)
    run: OutputConfig

    @property
    def row_budget(self) -> RowBudget:
        tokens = self.trainer.tokens_per_row or default_row(self.data.max_length)
        return RowBudget(self.optim.batch_size, tokens, self.trainer.workers or 1)

    @property
    def reference_workers(self) -> bool:
        """Whether workers of their own compute the reference's log-probs."""
        return self.method.needs_reference and self.reference.where == "workers"

    @property
    def online(self) -> bool:
        return self.rounds.mode == "online"

    @model_validator(mode="after")
    def _has_data(self) -> "RunConfig":
        if not self.online and not self.data.train:
            raise ValueError("data.train is missing; rounds.mode=offline trains on preference pairs, so name a file")
        if self.online and not self.data.prompts:
            raise ValueError("data.prompts is missing; rounds.mode=online samples for prompts, so name a file")
        if self.online and not (self.reward.function or self.reward.model):
            raise ValueError("reward.function or reward.model is missing; rounds.mode=online needs a reward source")
        if self.online and self.rounds.data == "split":
            raise ValueError("rounds.data=split is for offline rounds; online ones take rollout.prompts each")
        if self.serve.gates.min_win_rate is not None and not self.online:
            raise ValueError("serve.gates.min_win_rate needs a reward source: use rounds.mode=online, or drop it")
        return self

    @model_validator(mode="after")
    def _samples_make_pairs(self) -> "RunConfig":
        if self.online and self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples={self.rollout.samples} gives no pairs; rounds.mode=online needs 2 or more"
            )
        if self.online and self.rollout.max_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt within "
                f"data.max_length={self.data.max_length}; make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _loss_gets_its_reference(self) -> "RunConfig":
        if self.reference.positions == "sampled" and (self.method.reduction, self.method.mask) != ("sample", "shared"):
            raise ValueError(
                "reference.positions=sampled needs method.reduction=sample and method.mask=shared, not "
                f"{self.method.reduction} and {self.method.mask}; use reference.positions=all"
            )
        if self.method.needs_distributions and self.trainer.zero_stage == 3:
            raise ValueError(
                f"method.loss={self.method.loss!r} keeps its reference whole on each rank, and trainer.zero_stage=3 "
                "shards the policy because that is too much; use trainer.zero_stage=2"
            )
        if self.method.needs_distributions and self.reference != ReferenceConfig():
            raise ValueError(
                f"method.loss={self.method.loss!r} has its reference beside the policy; drop reference.where and "
                "reference.positions, which are for stored log-probs"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_train(self) -> "RunConfig":
        if self.model.flex and self.trainer.gradient_checkpointing == "selective":
            raise ValueError(
                "trainer.gradient_checkpointing=selective does not go with model.attention=flex; use true or false"
            )
        workers = self.trainer.workers or 1
        if self.optim.batch_size % workers:
            raise ValueError(
                f"optim.batch_size={self.optim.batch_size} does not divide over trainer.workers={workers}; "
                f"use {max(1, self.optim.batch_size // workers) * workers}"
            )
        if self.trainer.tokens_per_row is not None and self.trainer.tokens_per_row < 2 * self.data.max_length:
            raise ValueError(
                f"trainer.tokens_per_row={self.trainer.tokens_per_row} does not hold the longest pair, two answers of "
                f"up to data.max_length={self.data.max_length}; use {2 * self.data.max_length} or more"
            )
        return self
