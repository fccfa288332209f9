"""`optim`, `reference` and `trainer`: how a round is trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sampo_ray.config.base import Section


class OptimConfig(Section):
    learning_rate: float = Field(4e-7, gt=0)
    """Peak learning rate; linear warm-up, then linear decay to zero, anew in each round."""
    batch_size: int = Field(128, ge=1)
    """Pairs per optimizer step, over all ranks."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of a round's steps spent warming up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator floor."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""


class ReferenceConfig(Section):
    where: Literal["workers", "trainer"] = "workers"
    """Who computes the log-probs of a round's reference: workers of their own, or the trainer's ranks before the
    round's first step, when the policy still is the reference. `trainer` saves a copy of the model; same bits."""
    positions: Literal["all", "sampled"] = "all"
    """`sampled`: only of the tokens that SamPO's masks keep; other tokens get NaN. Same bits for less of the head's
    work, but stored log-probs are good for this run's masks alone."""


class TrainerConfig(Section):
    workers: int | None = Field(None, ge=1)
    """Data-parallel ranks. Default: one per GPU (cluster profile), one (laptop)."""
    min_workers: int | None = Field(None, ge=1)
    """Ranks that training goes on with, from its last checkpoint, when nodes are gone; once they are back, all train
    again. Ray counts what nodes have, replicas on them or not. Default: it waits for room for all."""
    num_cpus: float | None = Field(None, ge=0)
    """Logical CPUs a rank asks Ray for."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs a rank asks Ray for. Default: 1 where the profile has them."""
    zero_stage: Literal[2, 3] = 2
    """DeepSpeed ZeRO stage; 3 also shards the parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in host memory instead of the GPU's: gradients and optimizer, or with zero_stage=3 all."""
    tokens_per_row: int | None = Field(None, ge=16)
    """Tokens of a micro-batch. Default: twice `data.max_length`, in which any pair fits, and no fewer than 4,096: each
    micro-batch costs a pass over all gradients."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimizer steps between checkpoints; the end of a round always has one."""
    gradient_checkpointing: bool | Literal["selective"] = True
    """What of a layer is computed again in the backward pass: all but its input (true), nothing (false), or all but its
    input, attention and the products that make it wider (selective), which takes more memory and less time."""
    lifetime: Literal["run", "round"] = "run"
    """`round`: ranks end with each round, and their GPUs are free until the next trains; the result is the same."""
    max_skipped: int = Field(3, ge=0)
    """Steps in a row that may be skipped because loss or gradient is not finite; one more stops the run."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the ranks after crashes before the run stops."""

    @model_validator(mode="after")
    def _can_offload(self) -> "TrainerConfig":
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload='parameters' needs zero_stage=3, not {self.zero_stage}; use offload='optimizer'")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "TrainerConfig":
        if self.workers is not None and self.fewest > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; make it smaller")
        return self

    @property
    def fewest(self) -> int:
        """Ranks that must be able to hold the model."""
        return self.min_workers or self.workers or 1
