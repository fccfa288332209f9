"""Whether ranks and engines that use the same GPUs fit in their memory, and the part that vLLM is told to take."""

from __future__ import annotations

from collections.abc import Sequence

from sampo_ray.config.gpu_memory import GpuShares, Needs, by_turns, side_by_side
from sampo_ray.config.machines import Node
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sizing import GIB, UTILIZATION, Layout, ModelMemory, changed, engine_workers, groups_of, value_of

SIDE_BY_SIDE, BY_TURNS = 0.3, 0.7
"""What an engine takes of a GPU of which the memory, or that of the model, is not known."""


def gpu_shares(
    config: RunConfig, layout: Layout, nodes: Sequence[Node], memory: ModelMemory | None
) -> GpuShares | None:
    """How a device's rank and engines share it; None where each has its own, or where it is not known."""
    sizes = [node.gpu_memory for node in nodes if node.gpus]
    engines = _engines(config)
    if layout.whole or memory is None or not engines or not sizes or not all(sizes):
        return None
    parts = engine_workers(config.fleet.generators.engine)
    weights, tokens = engines * memory.weights // parts, engines * memory.kv_per_token // parts
    needs = Needs(memory.rank(config).gpu, weights, tokens, config.data.max_length)
    return (by_turns if layout.placement == "shared" else side_by_side)(needs, min(sizes))


def with_utilization(config: RunConfig, layout: Layout, on_gpu: GpuShares | None) -> RunConfig:
    """The configuration with the part of a GPU's memory that an engine takes, where it shares it and is not given."""
    if layout.whole or not layout.gpus or value_of(config, UTILIZATION) is not None:
        return config
    unknown = BY_TURNS if layout.placement == "shared" else SIDE_BY_SIDE
    part = int(100 * on_gpu.utilization / _engines(config)) / 100 if on_gpu else unknown
    return changed(config, UTILIZATION, part)


def no_gpu_memory(config: RunConfig, on_gpu: GpuShares) -> str:
    """What a rank and an engine lack on one GPU, and what to change."""
    lacks = [
        f"{who} lacks {bytes / GIB:.1f} GiB"
        for who, bytes in (("a rank", on_gpu.rank_lacks), ("an engine", on_gpu.engine_lacks))
        if bytes
    ]
    trainer, adapters = config.trainer, config.model.lora is not None
    advice = on_gpu.advice(trainer.offload != "none", adapters, trainer.zero_stage == 3)
    return f"model.path={config.model.path!r} does not fit on a GPU here: {' and '.join(lacks)}; use {advice}"


def _engines(config: RunConfig) -> int:
    """Kinds of engines for which a device must have room at once."""
    return sum(group.role in ("policy", "generators") and group.kept > 0 for group in groups_of(config))
