"""DeepSpeed optimizer steps over packed rows of preference pairs, one process per data-parallel rank.

torch.distributed must be initialised; all methods are collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sampo_ray.errors import TrainingError
from sampo_ray.training.batching import Pair, Pairs, Row, Step
from sampo_ray.training.host_copies import HostBuffer, with_copies
from sampo_ray.training.lora import Weight, adapter_names, without_adapters
from sampo_ray.training.memory import BUCKET
from sampo_ray.training.objective import METRICS, Draw, LossInputs, accumulate, objective_of, zero_loss
from sampo_ray.training.policy import batch_rows, every_token, policy_without_weights, row_logprobs, with_logprobs
from sampo_ray.training.saving import Cast, SavedModel
from sampo_ray.training.snapshots import Snapshot, WeightFile
from sampo_ray.training.statistics import Statistics

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from sampo_ray.config.run import RunConfig
    from sampo_ray.config.sections import OptimConfig
    from sampo_ray.training.host_copies import HostBuffer
    from sampo_ray.training.logprobs import Distributions
    from sampo_ray.training.policy import Policy, Reference, Scores, SelectPositions

T = TypeVar("T")
StepValues = dict[str, float | str | None]
"""Metrics of a step by name; `reason` is text, and `grad_norm` None where DeepSpeed has none."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step 1..steps of a round: linear warm-up to the peak, then linear decay towards zero."""
    warmup = math.ceil(optim.warmup_ratio * steps)
    if step <= warmup:
        return optim.learning_rate * step / warmup
    return optim.learning_rate * (steps - step + 1) / (steps - warmup)


def deepspeed_config(config: RunConfig, device: torch.device) -> dict[str, object]:
    """bf16 compute, fp32 masters, accumulation and reduction; a step whose gradients are not finite is discarded.

    On GPUs gradients are reduced while the backward pass goes on, in buckets that are large enough for the network (two
    of 256 MiB, as the next is filled meanwhile). On CPUs both would use the same cores, and memory is short.
    """
    gpu = device.type == "cuda"
    zero: dict[str, object] = {
        "stage": config.trainer.zero_stage,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        # The default makes copies of the gradients of half a billion parameters.
        "reduce_bucket_size": BUCKET["cuda" if gpu else "cpu"],
    }
    host = {"device": "cpu", "pin_memory": gpu}
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
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW on the host, too, which needs no compiler
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU in each forward
    }


def load_trained(config: RunConfig, folder: Path, seed: int, device: torch.device) -> Policy:
    """The policy that a `Learner` trains, from the base or, with adapters (random by `seed`), what a round starts from.

    Under ZeRO-3 each rank reads its share of the weights, and has no more of them at any time.
    """
    checkpointing, lora, kind = config.trainer.gradient_checkpointing, config.model.lora, config.model.computed
    policy, weights = policy_without_weights(folder, checkpointing, lora, seed, kind)
    if config.trainer.zero_stage == 3:
        from sampo_ray.internals.deepspeed import partition, skip_shared_memory_extension

        skip_shared_memory_extension()
        shares = weights.shares(policy.model, dist.get_rank(), dist.get_world_size())
        partition(policy, deepspeed_config(config, device), shares)
    else:
        weights.fill(policy.model, device)
        policy.to(device)
    return policy.in_batches(config.batches_answers)


class Learner:
    """A policy and its optimizer, `step` optimizer steps into `round`."""

    def __init__(self, policy: Policy, config: RunConfig, device: torch.device) -> None:
        import deepspeed

        from sampo_ray.internals.deepspeed import skip_shared_memory_extension

        skip_shared_memory_extension()
        self.config, self.device, self.objective = config, device, objective_of(config.method)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        optim = config.optim
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(trained, optim.learning_rate, optim.betas, optim.eps, optim.weight_decay, fused=True)
        self._saved = SavedModel(policy.model)
        self._engine: DeepSpeedEngine = deepspeed.initialize(
            model=policy, optimizer=adamw, config=deepspeed_config(config, device), dist_init_required=False
        )[0]
        self._engine.train()
        self.round, self.step, self.statistics = 0, 0, Statistics()
        self._reference: Reference | None = None
        self._skipped, self._not_finite = 0, dict[str, None]()
        self._copying = list[Callable[[], object]]()

    @property
    def policy(self) -> Policy:
        policy: Policy = self._engine.module
        return policy

    def begin_round(self, round: int, reference: Callable[[], Policy] | None = None) -> None:
        """Resets the optimizer's moments and step counts; the fp32 masters stay.

        `reference` loads the policy that the round starts from, for a loss that needs its distributions. It is not
        called where the policy has adapters: without these it is the reference.
        """
        from sampo_ray.internals.deepspeed import clear_moments

        self.finish_copies()
        clear_moments(self._engine)
        self.round, self.step, self.statistics = round, 0, Statistics()
        if self.config.method.needs_distributions and self.config.model.lora:
            self._reference = self._without_adapters
        elif self.config.method.needs_distributions:
            assert reference is not None, "a loss of distributions needs a reference"
            self._reference = None
            gc.collect()  # frees the old one, which is in reference cycles, before the next is loaded
            self._reference = reference().distributions

    def _without_adapters(self, row: Row, predicted: Tensor) -> Distributions:
        self._engine.eval()
        with without_adapters(self.policy.model):
            distributions = self.policy.distributions(row, predicted)
        self._engine.train()
        return distributions

    def optimize(self, step: Step, pairs: Pairs, steps: int) -> StepValues:
        """The round's next step of `steps`: mean loss over the pairs of the global batch, summed over rows and ranks.

        `pairs` has those of this rank's rows. Returns METRICS, `learning_rate`, `grad_norm` and `skipped`: 0, or how
        many steps in a row had a loss or gradient that is not finite and so changed nothing. Such a step has a `reason`
        instead of METRICS. TrainingError, naming pairs, when there are more of them than `trainer.max_skipped`.
        """
        draw = Draw(self.config.run.seed, self.round, step.epoch)
        inputs = LossInputs(self.objective, draw, self.statistics, self._reference)
        weight, backward = self.world / step.pairs, self._engine.backward
        sums, rows = accumulate(self._engine, step.rows[self.rank], pairs, inputs, weight, backward)
        dist.all_reduce(sums)
        metrics = dict(zip(METRICS, (sums / step.pairs).tolist(), strict=True))
        if not math.isfinite(metrics["loss"]):
            # Such a loss may have finite gradients; this adds ones that are not, so that all ranks discard the step.
            self._engine.backward(zero_loss(self._engine, self.device) * math.nan)
        rate = learning_rate(self.config.optim, step.index, steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self.finish_copies()
        self._engine.step()
        self.step = step.index
        if not self._engine.was_step_applied():
            return {"learning_rate": rate, **self._skip(rows)}
        self._skipped, self._not_finite = 0, {}
        self.statistics = self.statistics.after(metrics, step.pairs)
        norm = self._engine.get_global_grad_norm()
        return metrics | {"learning_rate": rate, "grad_norm": float(norm) if norm is not None else None, "skipped": 0.0}

    def score(self, pairs: Sequence[Pair], select: SelectPositions = every_token) -> list[Pair]:
        """The pairs with the policy's log-probs as those of their reference, which it is when a round starts.

        They begin with a whole global batch. Each rank computes its own rows, in the shapes of the first epoch.
        """
        budget = dataclasses.replace(self.config.row_budget, world=self.world)
        scores: Scores = {}
        self._engine.eval()
        with torch.no_grad():
            for rows in batch_rows(pairs, budget):
                for indices in rows[self.rank :: self.world]:
                    if len(indices):
                        scores |= row_logprobs(self._engine, pairs, indices, select)
                    else:
                        zero_loss(self._engine, self.device)  # under ZeRO-3 a forward gathers weights from all ranks
        self._engine.train()
        return with_logprobs(pairs, {index: each for part in from_all_ranks(scores) for index, each in part.items()})

    def _skip(self, rows: list[tuple[list[Pair], Tensor]]) -> StepValues:
        """Counts a discarded step; `skipped` and `reason` of its result."""
        by_pair = [(pair.id, loss) for pairs, of in rows for pair, loss in zip(pairs, of.tolist(), strict=True)]
        not_finite = [pair for pair, loss in by_pair if not math.isfinite(loss)]
        self._skipped += 1
        self._not_finite |= dict.fromkeys(pair for part in from_all_ranks(not_finite) for pair in part)
        reason, allowed = _skip_reason(list(self._not_finite)), self.config.trainer.max_skipped
        if self._skipped > allowed:
            raise TrainingError(
                f"{self._skipped} steps in a row, up to step {self.step} of round {self.round + 1}, had to be skipped "
                f"(trainer.max_skipped={allowed}): {reason}. Look at these pairs, or lower optim.learning_rate; "
                "nothing was published from these steps"
            )
        return {"skipped": float(self._skipped), "reason": reason}

    @functools.cached_property
    def adapter_names(self) -> dict[str, str] | None:
        """See `lora.adapter_names`; None also where there are no adapters."""
        return adapter_names(self.policy.model) or None

    def finish_copies(self) -> None:
        """Waits for the copies that were begun, before what they are made of changes; raises their errors. The methods
        here that change anything call it."""
        while self._copying:
            self._copying.pop()()

    def _snapshot(self, files: Sequence[WeightFile], buffer: HostBuffer) -> Snapshot:
        snapshot = Snapshot(files, buffer, self.rank, self.world)
        self._copying.append(snapshot.copied.result)
        return snapshot

    def weights(self, buffer: HostBuffer) -> Snapshot:
        """A checkpoint's tensors as they are computed with: bf16, but buffers and what transformers keeps in fp32."""
        return self._snapshot(self._saved.files(self.world, Cast(torch.bfloat16)), buffer)

    def adapters(self, buffer: HostBuffer) -> Snapshot:
        """The adapters as they are computed with, in a file of peft's; `adapter_names` must not be None."""
        assert self.adapter_names is not None
        return self._snapshot([self._saved.adapters_file(self.adapter_names)], buffer)

    def masters(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint from the fp32 masters, in `dtype`: one by one, under ZeRO-3 gathered until the
        next is taken. Only rank 0 gets a checkpoint's names and shapes; the others take part. In the end an
        OverflowingWeightsError, on all ranks, if some were finite and are not in `dtype`.
        """
        tensors = self._masters(Cast(dtype))
        return tensors if self.rank else self._saved.converted(tensors)

    def _masters(self, cast: Cast) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        def master(part: Parameter) -> Tensor:
            return safe_get_full_fp32_param(part) if part.requires_grad else part.data.float()

        def frozen(weight: Weight) -> AbstractContextManager[object]:
            return self._gathered([part for part in weight.parts if not part.requires_grad])

        yield from self._saved.tensors(cast, master, frozen)
        cast.check()

    def _gathered(self, parameters: list[Parameter]) -> AbstractContextManager[object]:
        from deepspeed import zero

        sharded = self.config.trainer.zero_stage == 3 and parameters
        return zero.GatheredParameters(parameters) if sharded else contextlib.nullcontext()

    def snapshot(self, buffer: HostBuffer) -> Future[dict[str, object]]:
        """Begins to copy this rank's share of masters and moments to `buffer`: what to write with torch.save, by file
        name. These are pickles, so resuming must trust them. Collective."""
        from sampo_ray.internals.deepspeed import checkpoint_states

        states = with_copies(checkpoint_states(self._engine), buffer)
        self._copying.append(states.result)
        return states

    def warm(self, buffer: HostBuffer) -> None:
        """Takes the memory that snapshots need, which is slow when it is written for the first time; collective."""
        from sampo_ray.internals.deepspeed import missing_moments

        self.snapshot(buffer)
        self.finish_copies()
        buffer.add(missing_moments(self._engine))

    @property
    def files(self) -> list[str]:
        """Names of the files that this rank loads of what as many ranks saved."""
        from sampo_ray.internals.deepspeed import checkpoint_files

        return checkpoint_files(self._engine)

    def load(
        self, folder: Path, tag: str, round: int, step: int, statistics: Statistics, universal: bool = False
    ) -> None:
        """Continues from what was written of a snapshot at this step of this round; `universal`: or what
        `write_universal` made of it."""
        from sampo_ray.internals.deepspeed import load_checkpoint

        self.finish_copies()
        load_checkpoint(self._engine, folder, tag, universal)
        self.round, self.step, self.statistics = round, step, statistics


def _skip_reason(pairs: list[str]) -> str:
    if not pairs:
        return "all losses were finite, but a gradient was not"
    named, more = ", ".join(pairs[:10]), len(pairs) - 10
    return f"the loss is not finite of pair {named}" + (f" and {more} more" if more > 0 else "")


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, by rank; collective in the `group`, which has all of them."""
    dist.all_gather_object(values := [value] * dist.get_world_size(), value, group)
    return values


def drain(tensors: Iterator[object]) -> None:
    """Takes part in the collectives of an iteration whose values another rank uses."""
    for _ in tensors:
        pass
