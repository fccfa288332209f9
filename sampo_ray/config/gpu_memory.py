"""How a training rank and a policy engine share the memory of one GPU: side by side, or by turns."""

from dataclasses import dataclass

RUNTIME = 3 << 28
"""Bytes that a process has on a GPU besides its tensors: CUDA's context, libraries, communicators."""
ASLEEP = 3 << 29
"""Bytes that an engine keeps while it sleeps: the same, and the graphs and buffers outside of vLLM's pool."""
STEP = 3 << 29
"""Bytes that an engine needs besides weights and KV cache: activations of its largest batch, sampler, graphs."""
ANSWERS = 4
"""Sequences of the greatest length that an engine must be able to hold, at least."""
MOST = 0.9
"""Of a GPU's memory an engine takes no more, however much is free."""


@dataclass(frozen=True)
class Needs:
    """Bytes on one GPU: of a rank (states, activations, head), of an engine's part of the weights, of its KV cache a
    token, and of models that stay (`others`: a reward model); and the tokens of the longest sequence."""

    rank: int
    weights: int
    kv_per_token: int
    longest: int
    others: int = 0

    @property
    def engine(self) -> int:
        """Bytes that an engine must be given."""
        return self.weights + STEP + ANSWERS * self.longest * self.kv_per_token


@dataclass(frozen=True)
class GpuShares:
    """`utilization`: what vLLM is told, the part of the memory that an engine may take. Bytes that rank and engine
    lack, each 0 where it fits."""

    utilization: float
    rank_lacks: int = 0
    engine_lacks: int = 0

    @property
    def fit(self) -> bool:
        return not self.rank_lacks and not self.engine_lacks

    def advice(self, offloads: bool, adapters: bool, sharded: bool = False) -> str:
        """What to change where they do not fit, for a run that has (or has not) optimizer offload, adapters, ZeRO-3."""
        rank = ["trainer.offload=optimizer"] * (not offloads) + ["model.lora.rank=16"] * (not adapters)
        rank += ["trainer.zero_stage=3"] * (offloads and not sharded)  # which leaves the gradients on the host
        each = rank * bool(self.rank_lacks) + ["a smaller data.max_length", "a smaller model.path"]
        return f"{', '.join(each[:-1])} or {each[-1]}"


def side_by_side(needs: Needs, gpu: int) -> GpuShares:
    """A rank and an engine that both keep their memory on a GPU of `gpu` bytes."""
    left = gpu - needs.others - needs.rank - RUNTIME
    missing = max(0, needs.engine - min(left, int(MOST * gpu)))
    return GpuShares(_utilization(left, gpu), missing, missing)  # either could make room for the other


def by_turns(needs: Needs, gpu: int) -> GpuShares:
    """A rank and an engine of which one is in host memory while the other works."""
    engine = gpu - needs.others - RUNTIME
    rank = engine - ASLEEP
    return GpuShares(
        _utilization(engine, gpu), max(0, needs.rank - rank), max(0, needs.engine - min(engine, int(MOST * gpu)))
    )


def _utilization(left: int, gpu: int) -> float:
    """Rounded down to whole per cents: an engine does not start where less is free than it is promised."""
    return max(0, min(int(100 * MOST), 100 * left // gpu)) / 100
