"""Profiles: how large a run is on the machines it finds. Fills what the configuration leaves open; nothing else does."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sampo_ray.config import FleetConfig, RunConfig

Resolved = Literal["laptop", "cluster"]


def resolve(config: RunConfig, resources: Mapping[str, float], cores: int) -> tuple[RunConfig, list[str]]:
    """The configuration with every open size filled in, and notes on what was made smaller than asked for.

    `resources` are those of the Ray cluster (CPU, GPU), `cores` the real cores of this machine. `auto` becomes `cluster`
    where there are GPUs, else `laptop`, on which a recipe for GPUs runs with fewer workers and replicas.
    """
    gpus = int(resources.get("GPU", 0))
    auto = config.profile == "auto"
    profile: Resolved = ("cluster" if gpus else "laptop") if auto else config.profile  # type: ignore[assignment]
    plan = _cluster(config, gpus) if profile == "cluster" and gpus else _laptop(config, cores if auto else None)
    notes = [
        f"{name}: {before} -> {after} ({profile} profile)"
        for name, before, after in _changes(config, plan)
        if before is not None and auto
    ]
    tree = config.model_dump() | {"profile": profile}
    tree["trainer"] |= plan["trainer"]
    for fleet in ("generators", "references", "rewards"):
        tree["fleet"][fleet] |= plan[fleet]
    return RunConfig.model_validate(tree), notes


def _laptop(config: RunConfig, at_most: int | None) -> dict[str, dict[str, Any]]:
    """One of everything on CPUs that all share; with a limit, no more ranks or replicas than that."""

    def size(asked: int | None) -> int:
        return min(asked or 1, at_most) if at_most else asked or 1

    def fleet(asked: FleetConfig, cpus: float) -> dict[str, Any]:
        most = size(asked.max_replicas)
        least = 1 if asked.min_replicas is None else asked.min_replicas
        logical = cpus if asked.num_cpus is None or at_most else asked.num_cpus
        return {"num_gpus": 0, "num_cpus": logical, "max_replicas": most, "min_replicas": min(least, most)}

    workers = size(config.trainer.workers)
    while config.optim.batch_size % workers:
        workers -= 1
    return {
        "trainer": {"workers": workers, "num_gpus": 0, "num_cpus": 0.5},
        "generators": fleet(config.fleet.generators, 0.5),
        "references": fleet(config.fleet.references, 0.5),
        "rewards": fleet(config.fleet.rewards, 0.1),
    }


def _cluster(config: RunConfig, gpus: int) -> dict[str, dict[str, Any]]:
    """Whole GPUs where there are enough: generators a quarter, one reference, trainers the rest; else shares of each."""
    fleets = config.fleet
    sampling = config.online or config.serve.enabled
    roomy = gpus >= 4
    generators = max(1, gpus // 4) if sampling else 0
    left = max(1, gpus - generators - 1) if roomy else gpus
    workers = config.trainer.workers or math.gcd(left, config.optim.batch_size)
    share = {"trainer": 1.0, "generators": 1.0, "references": 1.0} if roomy else _SHARES
    engine = dict(fleets.generators.engine)
    if not roomy:
        engine.setdefault("gpu_memory_utilization", share["generators"])

    def fleet(asked: FleetConfig, gpus_each: float, most: int) -> dict[str, Any]:
        least = 1 if asked.min_replicas is None else asked.min_replicas
        most = max(asked.max_replicas or most, least, 1)
        each = gpus_each if asked.num_gpus is None else asked.num_gpus
        return {"num_gpus": each, "num_cpus": asked.num_cpus or 1.0, "min_replicas": least, "max_replicas": most}

    reward_gpus = share["references"] if config.reward.model else 0
    return {
        "trainer": {"workers": workers, "num_gpus": share["trainer"], "num_cpus": 1.0},
        "generators": {**fleet(fleets.generators, share["generators"], generators), "engine": engine},
        "references": fleet(fleets.references, share["references"], 1),
        "rewards": fleet(fleets.rewards, reward_gpus, 1),
    }


_SHARES = {"trainer": 0.5, "generators": 0.3, "references": 0.1}


def _changes(config: RunConfig, plan: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any, Any]]:
    asked = {"trainer": config.trainer, **{n: getattr(config.fleet, n) for n in ("generators", "references", "rewards")}}
    return [
        (f"{'' if part == 'trainer' else 'fleet.'}{part}.{name}", getattr(asked[part], name), value)
        for part, values in plan.items()
        for name, value in values.items()
        if name in ("workers", "min_replicas", "max_replicas") and getattr(asked[part], name) != value
    ]
