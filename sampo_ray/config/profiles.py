"""Profiles: how large a run is on the machines it finds. They fill what the configuration leaves open."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sampo_ray.config.fleet import FleetConfig
from sampo_ray.config.run import RunConfig
from sampo_ray.config.training import TrainerConfig
from sampo_ray.errors import ConfigError

Resolved = Literal["laptop", "cluster"]
CLUSTER_GPUS = 4
"""Trainer, reference, generators and live policy each have GPUs of their own from this many on."""
SMALL_ACTORS_CPUS, TASK_CPUS = 0.3, 0.5
"""Logical CPUs that weight store, exchange and endpoint ask Ray for together, and the largest task beside them."""


def resolve(config: RunConfig, resources: Mapping[str, float], cores: int) -> tuple[RunConfig, list[str]]:
    """The configuration with every open size filled in, and notes on what was made smaller than asked for or may wait.

    `resources` are those of the Ray cluster (CPU, GPU), `cores` the real cores of this machine. `auto` becomes
    `cluster` where there are GPUs enough, else `laptop`, on which a recipe for GPUs runs with fewer workers and
    replicas.

    Raises ConfigError when the cluster profile is asked for by name and there are too few GPUs, and for a transport of
    weights that cannot work where the profile puts trainer and replicas.
    """
    gpus = int(resources.get("GPU", 0))
    auto = config.profile == "auto"
    profile: Resolved = ("cluster" if gpus >= CLUSTER_GPUS else "laptop") if auto else config.profile  # type: ignore[assignment]
    if profile == "cluster" and gpus < CLUSTER_GPUS:
        raise ConfigError(f"profile='cluster' needs {CLUSTER_GPUS} GPUs or more, Ray has {gpus}; use profile=laptop")
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
    resolved = RunConfig.model_validate(tree)
    asked, cpus = _cpus(resolved), resources.get("CPU", math.inf)
    if asked + TASK_CPUS > cpus:
        notes.append(
            f"this run's actors ask Ray for {asked:.1f} CPUs and its tasks for {TASK_CPUS} more, Ray has {cpus:g}: it "
            "will wait for nodes; if none come, start Ray with more --num-cpus, or lower trainer.num_cpus"
        )
    return resolved, notes


def _cpus(config: RunConfig) -> float:
    """Logical CPUs that the actors of a run ask for, a fleet that scales from zero with one replica."""
    fleets, trainer = config.fleet, config.trainer
    used = [fleets.references] * config.reference_workers + [fleets.rewards] * config.online
    uses = config.online + config.serve.enabled
    used += [fleets.generators] * (uses if config.profile == "cluster" else min(uses, 1))  # a laptop's are for both
    replicas = sum(max(1, fleet.autoscaling["min_replicas"]) * (fleet.num_cpus or 0) for fleet in used)
    return SMALL_ACTORS_CPUS + (trainer.workers or 1) * (trainer.num_cpus or 0) + replicas


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
    return {
        # Of two halves Ray may make one GPU, on which two ranks cannot be.
        "trainer": _ranks(config.trainer, workers, (0.5 if workers == 1 else 0.51) if gpus else 0, 0.5),
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
    share = 1.0 / max(scorers, 1)

    def fleet(asked: FleetConfig, each: float, most: int) -> dict[str, Any]:
        least = 1 if asked.min_replicas is None else asked.min_replicas
        most = max(asked.max_replicas or most, least, 1)
        each = each if asked.num_gpus is None else asked.num_gpus
        cpus = 1.0 if asked.num_cpus is None else asked.num_cpus
        return {"num_gpus": each, "num_cpus": cpus, "min_replicas": least, "max_replicas": most}

    return {
        "trainer": _ranks(config.trainer, workers, 1.0, 1.0),
        "generators": fleet(fleets.generators, 1.0, sampling or live),
        "references": fleet(fleets.references, share, 1),
        "rewards": fleet(fleets.rewards, share if config.reward.model else 0, 1),
    }


def _ranks(asked: TrainerConfig, workers: int, gpus: float, cpus: float) -> dict[str, Any]:
    """So many ranks, with as many GPUs each, and CPUs where the configuration does not say."""
    least = None if asked.min_workers is None else min(asked.min_workers, workers)
    cpus = cpus if asked.num_cpus is None else asked.num_cpus
    return {"workers": workers, "min_workers": least, "num_gpus": gpus, "num_cpus": cpus}


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
        if name in ("workers", "min_workers", "min_replicas", "max_replicas") and getattr(asked[part], name) != value
    ]
