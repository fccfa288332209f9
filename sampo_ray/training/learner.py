"""The training core: DeepSpeed optimizer steps over packed rows of preference pairs, one process a data-parallel rank.

It knows neither Ray nor the run directory. torch.distributed must be initialised; all methods are collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sampo_ray.errors import TrainingError
from sampo_ray.training.batching import Pair, Row, Step
from sampo_ray.training.lora import named_weights, without_adapters
from sampo_ray.training.objective import METRICS, Draw, accumulate, idle_loss, objective_of
from sampo_ray.training.policy import (
    Ask,
    Distributions,
    Policy,
    Reference,
    Scores,
    batch_rows,
    every_token,
    row_logprobs,
    with_logprobs,
)
from sampo_ray.training.statistics import Statistics

if TYPE_CHECKING:
    from sampo_ray.config.run import RunConfig
    from sampo_ray.config.training import OptimConfig


T = TypeVar("T")

NAMED_PAIRS = 10
"""Pairs that an error names at most."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step 1..steps of a round: linear warm-up to the peak, then linear decay towards zero."""
    warmup = math.ceil(optim.warmup_ratio * steps)
    if step <= warmup:
        return optim.learning_rate * step / warmup
    return optim.learning_rate * (steps - step + 1) / (steps - warmup)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings: bf16 compute; fp32 masters, accumulation and reduction; we say when a step ends.

    A step whose gradients are not finite is discarded (`check_grad_overflow`).
    """
    zero: dict[str, Any] = {
        "stage": config.trainer.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 2**24,  # the default makes copies of the gradients of half a billion parameters
    }
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.trainer.offload != "none":
        zero["offload_optimizer"] = host
    if config.trainer.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, on the host as well: nothing to compile
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU in each forward
    }


class Learner:
    """A policy and its optimizer, `step` optimizer steps into `round`."""

    def __init__(self, policy: Policy, config: RunConfig, device: torch.device) -> None:
        import deepspeed

        # Without this DeepSpeed compiles a shared-memory extension, for minutes, that gloo runs do not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.device, self.objective = config, device, objective_of(config.method)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        optim = config.optim
        adamw = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=policy, optimizer=adamw, config=deepspeed_config(config), dist_init_required=False
        )
        self._engine.train()
        self.round, self.step, self.statistics = 0, 0, Statistics()
        self._reference: Reference | None = None
        self._skipped, self._not_finite = 0, dict[str, None]()

    @property
    def policy(self) -> Policy:
        return self._engine.module

    def begin_round(self, round: int, reference: Callable[[], Policy] | None = None) -> None:
        """The optimizer starts afresh, in place: ZeRO keeps views of these tensors. The fp32 masters stay.

        `reference` loads what the round starts from, for a loss that asks for its distributions. It is not called where
        the policy has adapters: without these it is the reference.
        """
        for state in self._engine.optimizer.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "step"):
                if name in state:
                    state[name].zero_()
        self.round, self.step, self.statistics = round, 0, Statistics()
        if self.config.method.needs_distributions and self.config.model.lora:
            self._reference = self._without_adapters
        elif self.config.method.needs_distributions:
            assert reference is not None, "a loss of distributions needs a reference"
            self._reference = None
            gc.collect()  # the last one goes before the next is loaded; a model is in cycles
            self._reference = reference().distributions

    def _without_adapters(self, row: Row, states: Tensor) -> Distributions:
        self._engine.eval()
        with without_adapters(self.policy.model):
            found = self.policy.distributions(row, states)
        self._engine.train()
        return found

    def optimize(self, step: Step, pairs: Sequence[Pair], steps: int) -> dict[str, Any]:
        """The round's next step of `steps`: mean loss over the pairs of the global batch, summed over rows and ranks.

        `pairs` are all of the round's. Returns METRICS, `learning_rate`, `grad_norm` and `skipped`: 0, or how many
        steps in a row had a loss or gradient that is not finite and so changed nothing. Such a step has a `reason`
        instead of METRICS. TrainingError, naming pairs, when there are more of them than `trainer.max_skipped`.
        """
        sums, rows = accumulate(
            self._engine,
            step.rows[self.rank],
            pairs,
            self.objective,
            Draw(self.config.run.seed, self.round, step.epoch),
            self.statistics,
            self.world / step.pairs,
            self._reference,
            self._engine.backward,
        )
        dist.all_reduce(sums)
        metrics = dict(zip(METRICS, (sums / step.pairs).tolist(), strict=True))
        if not math.isfinite(metrics["loss"]):
            # A loss that is not finite may have finite gradients; with these the step is discarded, on all ranks.
            self._engine.backward(idle_loss(self._engine, self.device) * math.nan)
        rate = learning_rate(self.config.optim, step.index, steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self.step = step.index
        if not self._engine.was_step_applied():
            return {"learning_rate": rate, **self._skip(rows)}
        self._skipped, self._not_finite = 0, {}
        self.statistics = self.statistics.after(metrics, step.pairs)
        norm = self._engine.get_global_grad_norm()
        return metrics | {"learning_rate": rate, "grad_norm": float(norm) if norm is not None else None, "skipped": 0.0}

    def score(self, pairs: Sequence[Pair], ask: Ask = every_token) -> list[Pair]:
        """The pairs with the policy's own log-probs as their reference's: at a round's start they are.

        They begin with a whole global batch. Each rank computes its own rows, in the shapes of the first epoch.
        """
        budget = dataclasses.replace(self.config.row_budget, world=self.world)
        mine: Scores = {}
        self._engine.eval()
        with torch.no_grad():
            for rows in batch_rows(pairs, budget):
                for indices in rows[self.rank :: self.world]:
                    if len(indices):
                        mine |= row_logprobs(self._engine, pairs, indices, ask)
                    else:
                        idle_loss(self._engine, self.device)  # under ZeRO-3 a forward gathers weights from all ranks
        self._engine.train()
        return with_logprobs(pairs, {place: scores for some in of_all_ranks(mine) for place, scores in some.items()})

    def _skip(self, rows: list[tuple[list[Pair], Tensor]]) -> dict[str, Any]:
        """Counts a discarded step and says why it was."""
        mine = [
            pair.id
            for pairs, losses in rows
            for pair, loss in zip(pairs, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        self._skipped += 1
        self._not_finite |= dict.fromkeys(pair for some in of_all_ranks(mine) for pair in some)
        reason, allowed = _which(list(self._not_finite)), self.config.trainer.max_skipped
        if self._skipped > allowed:
            raise TrainingError(
                f"{self._skipped} steps in a row, up to step {self.step} of round {self.round + 1}, had to be skipped "
                f"(trainer.max_skipped={allowed}): {reason}. Look at these pairs, or lower optim.learning_rate; "
                "nothing was published from these steps"
            )
        return {"skipped": float(self._skipped), "reason": reason}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The bf16 weights, parameter by parameter; under ZeRO-3 each is gathered for as long as it is looked at."""
        for name, weight in named_weights(self.policy.model):
            with self._gathered(weight.parts):
                yield name, weight.merged(lambda part: part.data).bfloat16()

    def adapters(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The bf16 adapters: of each adapted weight its name, and A [rank, in] and B [out, rank]."""
        for name, weight in named_weights(self.policy.model):
            _, *parts = weight.parts
            if parts:
                with self._gathered(parts):
                    yield name, [part.data.bfloat16() for part in parts]

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 weights, parameter by parameter, each gathered from all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        def master(part: Parameter) -> Tensor:
            return safe_get_full_fp32_param(part) if part.requires_grad else part.data.float()

        for name, weight in named_weights(self.policy.model):
            with self._gathered([part for part in weight.parts if not part.requires_grad]):
                yield name, weight.merged(master)

    def _gathered(self, parameters: list[Parameter]) -> AbstractContextManager[Any]:
        from deepspeed import zero

        sharded = self.config.trainer.zero_stage == 3 and parameters
        return zero.GatheredParameters(parameters) if sharded else contextlib.nullcontext()

    def save(self, folder: Path, tag: str) -> None:
        """Writes this rank's share of optimizer and weights, but for frozen ones, to `folder`/`tag`.

        Pickles: trusted input for resuming.
        """
        frozen = self.config.model.lora is not None
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=frozen)

    def load(
        self, folder: Path, tag: str, round: int, step: int, statistics: Statistics, universal: bool = False
    ) -> None:
        """Goes back to what `save` wrote when it stood there; `universal`: to what `write_universal` made of that."""
        whole = self.config.model.lora is None
        # DeepSpeed takes this from its settings, but other checkpoints of this engine are not universal.
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=whole)
        self._engine._config.load_universal_checkpoint = False
        if universal:  # DeepSpeed leaves the count of steps on the host, and one tensor for all parameters
            for parameter, state in self._engine.optimizer.optimizer.state.items():
                state["step"] = state["step"].to(parameter.device, copy=True)
        self.round, self.step, self.statistics = round, step, statistics


def write_universal(checkpoint: Path, out: Path) -> None:
    """Writes what all ranks saved in `checkpoint` as one that any number of ranks can load: masters and moments by
    parameter (DeepSpeed's universal format; Lian et al. 2024, arXiv 2406.18820), the same bits.
    """
    from deepspeed.checkpoint import ds_to_universal

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": str(out)}
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(Namespace(**folders, **settings, inject_missing_state=True))


def _which(pairs: list[str]) -> str:
    if not pairs:
        return "all losses were finite, but a gradient was not"
    named, more = ", ".join(pairs[:NAMED_PAIRS]), len(pairs) - NAMED_PAIRS
    return f"the loss is not finite of pair {named}" + (f" and {more} more" if more > 0 else "")


def of_all_ranks(mine: T) -> list[T]:
    """What each rank has to say, by rank; collective."""
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def drain(tensors: Iterator[Any]) -> None:
    """Takes part in the collectives of an iteration whose values another rank uses."""
    for _ in tensors:
        pass
