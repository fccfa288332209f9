"""The sections of a configuration and their fields: each with its default, its bounds and what it is for."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sampo_ray.config.columns import ColumnsOfSources
from sampo_ray.config.judging import JudgeConfig
from sampo_ray.config.losses import LOSSES, REDUCTIONS, PreferenceLoss, advice, find_loss
from sampo_ray.config.rows import Attention
from sampo_ray.config.section import Section
from sampo_ray.errors import ConfigError, suggestion


class LoraConfig(Section):
    rank: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    alpha: int | None = Field(None, ge=1)
    """Adapters count `alpha` / `rank`. Default: twice `rank`."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get adapters, by the ends of their names (q_proj, mlp.down_proj), or `all-linear`: all linear layers
    but the head and routers. Experts that are one tensor get theirs by its name (experts.down_proj)."""

    @property
    def scaled_by(self) -> int:
        return self.alpha if self.alpha is not None else 2 * self.rank


class ModelConfig(Section):
    path: str
    """Hugging Face folder or hub name of the model to start from: safetensors, not quantised."""
    template: Literal["llama3-sampo", "llama3", "tokenizer"] = "llama3-sampo"
    """Prompt format: the card's, Meta's, or the one the tokenizer brings."""
    lora: LoraConfig | None = None
    """Train adapters on a frozen model; a round ends with them merged in. Default: train all weights."""
    attention: Attention | None = None
    """How trainer and reference compute attention: `segments`, two calls a pair over a prompt that is computed once;
    `flex`, PyTorch's FlexAttention, one call for a whole row of pairs, which needs GPUs; `own`, as transformers does
    for the model, each answer behind a prompt of its own. Default: segments where they are exact, else own.
    """

    @property
    def computed(self) -> Attention:
        """How attention is computed in a run; one that is not chosen yet is `segments`."""
        return self.attention or "segments"


class DataConfig(Section):
    train: str | tuple[str, ...] | None = None
    """Preference pairs (offline mode): JSON, CSV, TSV (.gz, .zst), Parquet, a folder, a hub name, any fsspec URL, or a
    list of these; NAME:SPLIT or NAME:CONFIGURATION:SPLIT."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts (online mode), in the same formats; a preference file works too, its answers are not read."""
    columns: ColumnsOfSources | None = None
    """What the columns of the rows are, as in {prompt: question, chosen: good}; the rest is found by probing the rows.
    A list with one entry a source, where there are several."""
    mix: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """The share of its rows that is used of each source of the list, above 0 and up to 1. Default: all rows."""
    max_length: int = Field(8192, ge=8)
    """Tokens of prompt plus response, at most."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Tokens of a prompt, at most; longer ones lose their oldest turns first. Default: 3/4 of `max_length`."""

    def names(self, online: bool) -> tuple[str, ...]:
        """The sources that a run reads: those of `prompts`, or of `train`."""
        named = self.prompts if online else self.train
        return (named,) if isinstance(named, str) else named or ()

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length if self.max_prompt_length is not None else self.max_length * 3 // 4

    @model_validator(mode="before")
    @classmethod
    def _columns_came_through_the_shell(cls, given: object) -> object:
        """Shells take braces apart that are not quoted, and YAML has no key where no space follows a colon."""
        columns = given.get("columns") if isinstance(given, dict) else None
        each = columns if isinstance(columns, list) else [columns]
        if any(isinstance(one, str) or (isinstance(one, dict) and any(":" in str(key) for key in one)) for one in each):
            raise ValueError(
                f"columns={columns!r}: write each as FIELD: COLUMN with a space behind the colon, and quote it for the "
                "shell, as in 'data.columns={prompt: question, chosen: good}'"
            )
        return given

    @model_validator(mode="after")
    def _room_for_a_response(self) -> "DataConfig":
        if self.prompt_limit >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response within "
                f"max_length={self.max_length}; make it smaller"
            )
        return self


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


class RewardSource(Section):
    function: str | None = None
    """`package.module:function` or `file.py:function`. It gets what it names of prompts, completions, completion_ids
    and the prompt file's columns, and returns one float each. `sampo_ray.rewards` has some that are ready to use."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `function` by name, instead of columns of that name."""
    model: str | None = None
    """Folder or hub name of a Hugging Face sequence-classification reward model."""
    judge: JudgeConfig | None = None
    """A language model behind an endpoint that compares the completions of a prompt, or rates each."""

    @property
    def kinds(self) -> list[str]:
        """Which kinds of source are set: one, or none."""
        return [kind for kind in ("function", "model", "judge") if getattr(self, kind)]

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSource":
        if len(self.kinds) > 1:
            both = " and ".join(self.kinds)
            raise ValueError(f"{both} are set together; keep one reward source, or add them up with reward.sum")
        if self.arguments and not self.function:
            raise ValueError(f"arguments={self.arguments} are for a function; set it, or drop them")
        return self


class RewardPart(RewardSource):
    """A reward source in a sum."""

    weight: float = Field(1.0, allow_inf_nan=False)
    """What its rewards are multiplied by."""

    @model_validator(mode="after")
    def _counts(self) -> "RewardPart":
        if not self.kinds:
            raise ValueError("function, model or judge is missing; each part of a sum is a reward source")
        if not self.weight:
            raise ValueError(f"weight={self.weight:g} makes a part that does not count; drop the part")
        return self


class RewardConfig(RewardSource):
    sum: tuple[RewardPart, ...] = ()
    """Instead of one source several, each with a `weight`: the reward is the weighted sum of theirs."""
    length_controlled: bool = False
    """Whether rewards lose what the lengths of completions explain of them: a fit over each round, within prompts."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds one scoring call of functions and models may take."""
    retries: int = Field(3, ge=0)
    """Further tries of a failed call, with backoff, before its completions are dropped."""

    @property
    def parts(self) -> tuple[RewardPart, ...]:
        """The sources with their weights: those of the sum, or the one that is set; none where there is no source."""
        alone = self.model_dump(include=set(RewardSource.model_fields))
        return self.sum or ((RewardPart.model_validate(alone),) if self.kinds else ())

    @property
    def has_model(self) -> bool:
        return any(part.model for part in self.parts)

    @property
    def compares(self) -> bool:
        """Whether rewards only tell answers to a prompt apart that are scored in one call."""
        return any(part.judge is not None and part.judge.mode == "pairwise" for part in self.parts)

    @model_validator(mode="after")
    def _sum_or_source(self) -> "RewardConfig":
        if self.sum and self.kinds:
            raise ValueError(f"sum is set beside {self.kinds[0]}; make that a part of the sum")
        return self


def _loss_if_here(name: str) -> PreferenceLoss | None:
    """The loss of that name; None for a user's that this machine does not have, or has in a form of no use."""
    try:
        return find_loss(name)
    except ValueError:
        if ":" in name:
            return None
        raise


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
        return (loss := _loss_if_here(self.loss)) is None or loss.reference == "log-probs"

    @property
    def needs_distributions(self) -> bool:
        """Whether training keeps the reference beside the policy."""
        return (loss := _loss_if_here(self.loss)) is not None and loss.reference == "distributions"

    def check_loss(self) -> None:
        """ConfigError where a user's loss cannot be used. For where training starts: a run directory is read, and its
        run served, on machines without the loss as well.
        """
        try:
            find_loss(self.loss)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, given: object) -> object:
        if not isinstance(given, dict) or not isinstance(name := given.get("loss", "sigmoid"), str):
            return given
        if name not in LOSSES and ":" not in name:
            raise ValueError(f"loss={name!r} is not known; {advice(name)}")
        if (loss := _loss_if_here(name)) is None:
            return given
        reduction = "sample" if "sample" in loss.reductions else loss.reductions[0]
        defaults = {"reduction": reduction, **loss.settings}
        return {**given, **{key: value for key, value in defaults.items() if given.get(key) is None}}

    @model_validator(mode="after")
    def _compatible(self) -> "MethodConfig":
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not known; {suggestion(self.reduction, REDUCTIONS)}")
        if (loss := _loss_if_here(self.loss)) is None:
            return self
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
    where: Literal["auto", "workers", "trainer"] = "auto"
    """Who computes the log-probs of a round's reference: workers of their own, or the trainer's ranks before the
    round's first step, when the policy still is the reference. `trainer` saves a copy of the model; same bits on CPUs.
    `auto`: the ranks where they have GPUs, which would wait for the workers, unless sizes of workers are given."""
    positions: Literal["all", "sampled"] = "all"
    """`sampled`: only of the tokens that SamPO's masks keep; other tokens get NaN. Same bits (on CPUs) for less of
    the head's work, but stored log-probs are good for this run's masks alone."""


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
    """Restarts of the ranks after crashes without a new step between, before the run stops. An error that would come
    again, such as one of the data or a GPU's memory, stops it at once."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainerConfig":
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload='parameters' needs zero_stage=3, not {self.zero_stage}; use offload='optimizer'")
        if self.workers is not None and self.fewest > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; make it smaller")
        return self

    @property
    def fewest(self) -> int:
        """Ranks that must be able to hold the model."""
        return self.min_workers or self.workers or 1


class FleetConfig(Section):
    min_replicas: int | None = Field(None, ge=0)
    """Fewest replicas. Default: 1."""
    max_replicas: int | None = Field(None, ge=1)
    """Most replicas. Default: 1 (laptop), one per free GPU (cluster)."""
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests per replica that Serve scales towards. Default: 3/4 of `max_ongoing_requests`."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds that more replicas must be wanted before they are started."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds that fewer must be wanted before some are stopped."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests a replica works on at once."""
    max_queued_requests: int = Field(4096, ge=1)
    """Requests that wait at a caller before it is told to slow down."""
    num_cpus: float | None = Field(None, ge=0)
    """Logical CPUs a replica asks Ray for."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs a replica asks Ray for. Default: 1 where the profile has them."""

    @property
    def autoscaling(self) -> dict[str, float]:
        """Ray Serve's `autoscaling_config`, with every size explicit."""
        least = 1 if self.min_replicas is None else self.min_replicas
        return {
            "min_replicas": least,
            "max_replicas": max(1, least, self.max_replicas or 1),
            "target_ongoing_requests": self.target_ongoing_requests or max(1.0, 0.75 * self.max_ongoing_requests),
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }

    @model_validator(mode="after")
    def _ordered(self) -> "FleetConfig":
        if self.min_replicas is not None and self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


OTHERS_ENGINE_ARGUMENTS = {
    "tool_call_parser": "set serve.tools, which the endpoint and the prompt format are checked against",
    "enable_auto_tool_choice": "set serve.tools, which the endpoint and the prompt format are checked against",
    "structured_outputs_config": "constraints on answers are tried with xgrammar before an engine gets them",
    "logprobs_mode": "stored log-probs are the model's own, as those of the trainer are",
}


class GeneratorsConfig(FleetConfig):
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, e.g. `tensor_parallel_size` or `gpu_memory_utilization`."""

    def with_engine(self, arguments: dict[str, object]) -> "GeneratorsConfig":
        """These settings with further engine arguments."""
        return self.model_copy(update={"engine": {**self.engine, **arguments}})

    @model_validator(mode="after")
    def _no_arguments_of_others(self) -> "GeneratorsConfig":
        for name, reason in OTHERS_ENGINE_ARGUMENTS.items():
            if name in self.engine:
                raise ValueError(f"engine.{name} is not taken here: {reason}")
        return self


class FleetsConfig(Section):
    generators: GeneratorsConfig = GeneratorsConfig()
    references: FleetConfig = FleetConfig(max_ongoing_requests=2)
    rewards: FleetConfig = FleetConfig(max_ongoing_requests=8)
    placement: Literal["auto", "shared", "split"] = "auto"
    """`shared`: engines and ranks take turns on the same GPUs, all sample, then all train, and the live policy pauses
    meanwhile (503 with Retry-After). `split`: each has GPUs, or parts of them, of its own. Default: shared on fewer
    than four GPUs where nothing rules it out and they have no room for both, else split."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """Seconds that a start, or ranks that are started again, wait for nodes while none comes that they lack."""


class OutputConfig(Section):
    dir: str
    """Run directory: a local path or any fsspec URL; everything a run produces is in it."""
    seed: int = Field(0, ge=0)
    """Seeds data order, masks and sampling."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Metric trackers besides TensorBoard, which is always written."""
    export_dtype: Literal["float16", "bfloat16"] | None = None
    """Data type of the exported Hugging Face folders. None: bfloat16 if the model's files are in it, else float16."""
