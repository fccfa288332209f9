"""Profiles: how large a run is on the machines it finds. They fill what the configuration leaves open."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sampo_ray.config import ConfigError, FleetConfig, RunConfig

Resolved = Literal["laptop", "cluster"]
CLUSTER_GPUS = 4
"""Trainer, reference, generators and live policy each have GPUs of their own from this many on."""


def resolve(config: RunConfig, resources: Mapping[str, float], cores: int) -> tuple[RunConfig, list[str]]:
    """The configuration with every open size filled in, and notes on what was made smaller than asked for.

    `resources` are those of the Ray cluster (CPU, GPU), `cores` the real cores of this machine. `auto` becomes
    `cluster` where there are GPUs enough, else `laptop`, on which a recipe for GPUs runs with fewer workers and
    replicas.

    Raises ConfigError when the cluster profile is asked for by name and there are too few GPUs, for an attention that
    needs GPUs, and for a transport of weights that cannot work where the profile puts trainer and replicas.
    """
    gpus = int(resources.get("GPU", 0))
    auto = config.profile == "auto"
    profile: Resolved = ("cluster" if gpus >= CLUSTER_GPUS else "laptop") if auto else config.profile  # type: ignore[assignment]
    if profile == "cluster" and gpus < CLUSTER_GPUS:
        raise ConfigError(f"profile='cluster' needs {CLUSTER_GPUS} GPUs or more, Ray has {gpus}; use profile=laptop")
    if config.model.flex and not gpus:
        raise ConfigError("model.attention='flex' needs GPUs (on CPUs it has no backward pass); use segments")
    plan = _cluster(config, gpus) if profile == "cluster" else _laptop(config, gpus, (gpus or cores) if auto else None)
    _check_transport(config.publish.transport, plan["trainer"]["num_gpus"], plan["generators"]["num_gpus"])
    notes = [
        f"{name}: {before} -> {after} ({profile} profile)"
        for name, before, after in _changes(config, plan)
        if before is not None
    ]
    tree = config.model_dump() | {"profile": profile}
    tree["trainer"] |= plan["trainer"]
    for fleet in ("generators", "references", "rewards"):
        tree["fleet"][fleet] |= plan[fleet]
    return RunConfig.model_validate(tree), notes


def _laptop(config: RunConfig, gpus: int, at_most: int | None) -> dict[str, dict[str, Any]]:
    """One of everything, all sharing the CPUs or the few GPUs; with a limit, no more ranks or replicas than that."""

    def size(asked: int | None) -> int:
        return min(asked or 1, at_most) if at_most else asked or 1

    def fleet(asked: FleetConfig, cpus: float, share: float) -> dict[str, Any]:
        most = size(asked.max_replicas)
        least = min(1 if asked.min_replicas is None else asked.min_replicas, most)
        cpus = cpus if asked.num_cpus is None else asked.num_cpus
        return {"num_gpus": share if gpus else 0, "num_cpus": cpus, "max_replicas": most, "min_replicas": least}

    fleets, engine = config.fleet, dict(config.fleet.generators.engine)
    if gpus:
        engine.setdefault("gpu_memory_utilization", 0.3)
    workers = math.gcd(size(config.trainer.workers or gpus or 1), config.optim.batch_size)
    least = config.trainer.min_workers and min(config.trainer.min_workers, workers)
    cpus = 0.5 if config.trainer.num_cpus is None else config.trainer.num_cpus
    return {
        "trainer": {"workers": workers, "min_workers": least, "num_gpus": 0.5 if gpus else 0, "num_cpus": cpus},
        "generators": {**fleet(fleets.generators, 0.5, 0.3), "engine": engine},
        "references": fleet(fleets.references, 0.5, 0.1),
        "rewards": fleet(fleets.rewards, 0.1, 0.1 if config.reward.model else 0),
    }


def _cluster(config: RunConfig, gpus: int) -> dict[str, dict[str, Any]]:
    """Whole GPUs: the live policy and the reference one each, generators a quarter of all, the trainer the rest. A
    reward model lives beside the reference, or in its place where the loss needs none.
    """
    fleets = config.fleet
    live = 1 if config.serve.enabled else 0
    sampling = max(1, gpus // 4) if config.online else 0
    scorers = config.reference_workers + bool(config.reward.model)
    left = max(1, gpus - sampling - live - min(scorers, 1))
    workers = config.trainer.workers or max(n for n in range(1, left + 1) if config.optim.batch_size % n == 0)
    cpus = 1.0 if config.trainer.num_cpus is None else config.trainer.num_cpus
    share = 1.0 / max(scorers, 1)

    def fleet(asked: FleetConfig, each: float, most: int) -> dict[str, Any]:
        least = 1 if asked.min_replicas is None else asked.min_replicas
        most = max(asked.max_replicas or most, least, 1)
        each = each if asked.num_gpus is None else asked.num_gpus
        cpus = 1.0 if asked.num_cpus is None else asked.num_cpus
        return {"num_gpus": each, "num_cpus": cpus, "min_replicas": least, "max_replicas": most}

    return {
        "trainer": {"workers": workers, "num_gpus": 1.0, "num_cpus": cpus},
        "generators": fleet(fleets.generators, 1.0, sampling or live),
        "references": fleet(fleets.references, share, 1),
        "rewards": fleet(fleets.rewards, share if config.reward.model else 0, 1),
    }


def _check_transport(transport: str, trainer: float, replica: float) -> None:
    """`trainer` and `replica` are the GPUs of one rank and of one worker."""
    one = 0 < trainer < 1 and 0 < replica < 1
    if transport == "ipc" and not one:
        raise ConfigError(
            f"publish.transport='ipc' needs trainer and replicas on one GPU, here a rank has {trainer:g} and a replica "
            f"{replica:g}; use publish.transport={'broadcast' if trainer and replica else 'host'}"
        )
    if transport == "broadcast" and (one or bool(trainer) != bool(replica)):
        raise ConfigError(
            f"publish.transport='broadcast' needs a GPU for each rank and replica, or none for any, here a rank has "
            f"{trainer:g} and a replica {replica:g}; use publish.transport={'ipc' if one else 'host'}"
        )


def _changes(config: RunConfig, plan: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any, Any]]:
    asked = {
        "trainer": config.trainer,
        **{n: getattr(config.fleet, n) for n in ("generators", "references", "rewards")},
    }
    return [
        (f"{'' if part == 'trainer' else 'fleet.'}{part}.{name}", getattr(asked[part], name), value)
        for part, values in plan.items()
        for name, value in values.items()
        if name in ("workers", "min_replicas", "max_replicas") and getattr(asked[part], name) != value
    ]
