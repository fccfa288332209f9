"""Profiles: the sizes of a run that its configuration leaves open, chosen for the machines that Ray has."""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, TypeVar

from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.sections import FleetConfig, FleetsConfig, TrainerConfig
from sampo_ray.errors import ConfigError

F = TypeVar("F", bound=FleetConfig)
Sizes: TypeAlias = tuple[TrainerConfig, FleetsConfig]
CLUSTER_GPUS = 4
"""From this many GPUs on, trainer, reference, generators and live policy each have their own."""
SMALL_ACTORS_CPUS, TASK_CPUS = 0.3, 0.5
"""Logical CPUs that weight store, exchange and endpoint request from Ray together, and the largest task."""


def resolve(config: RunConfig, resources: Mapping[str, float], cores: int) -> tuple[RunConfig, list[str]]:
    """The configuration with every open size filled in, and notes on sizes that were reduced or may have to wait.

    `resources` are those of the Ray cluster (CPU, GPU), `cores` the real cores of this machine. `auto` becomes
    `cluster` where there are enough GPUs, else `laptop`, which runs a recipe for GPUs with fewer workers and replicas.

    Raises ConfigError if the cluster profile is requested by name and there are too few GPUs, if the weight transport
    cannot work between trainer and replicas as the profile places them, or if the sizes do not go with the rest.
    """
    gpus, auto = int(resources.get("GPU", 0)), config.profile == "auto"
    cluster = gpus >= CLUSTER_GPUS if auto else config.profile == "cluster"
    if cluster and gpus < CLUSTER_GPUS:
        raise ConfigError(f"profile='cluster' needs {CLUSTER_GPUS} GPUs or more, Ray has {gpus}; use profile=laptop")
    profile: Literal["laptop", "cluster"] = "cluster" if cluster else "laptop"
    trainer, fleet = _cluster(config, gpus) if cluster else _laptop(config, gpus, (gpus or cores) if auto else None)
    _check_transport(config.publish.transport, trainer.num_gpus or 0, fleet.generators.num_gpus or 0)
    notes = [f"{change} ({profile} profile)" for change in _changes(config, trainer, fleet)]
    filled = {"profile": profile, "trainer": trainer.model_dump(), "fleet": fleet.model_dump()}
    resolved = load_config(config.model_dump() | filled)
    asked, cpus = _cpus(resolved), resources.get("CPU", math.inf)
    if asked + TASK_CPUS > cpus:
        notes.append(
            f"this run's actors ask Ray for {asked:.1f} CPUs and its tasks for {TASK_CPUS} more, Ray has {cpus:g}: it "
            "will wait for nodes; if none come, start Ray with more --num-cpus, or lower trainer.num_cpus"
        )
    return resolved, notes


def _cpus(config: RunConfig) -> float:
    """Logical CPUs that a run's actors request; a fleet that scales from zero counts with one replica."""
    fleets, trainer = config.fleet, config.trainer
    used: list[FleetConfig] = [fleets.references] * config.reference_workers + [fleets.rewards] * config.online
    uses = config.online + config.serve.enabled
    used += [fleets.generators] * (uses if config.profile == "cluster" else min(uses, 1))  # a laptop's are for both
    replicas = sum(max(1, fleet.autoscaling["min_replicas"]) * (fleet.num_cpus or 0) for fleet in used)
    return SMALL_ACTORS_CPUS + (trainer.workers or 1) * (trainer.num_cpus or 0) + replicas


def _laptop(config: RunConfig, gpus: int, at_most: int | None) -> Sizes:
    """One of everything, all on the same CPUs or few GPUs; at most `at_most` ranks or replicas of each."""

    def size(asked: int | None) -> int:
        return min(asked or 1, at_most) if at_most else asked or 1

    def fleet(asked: F, cpus: float, share: float) -> F:
        most = size(asked.max_replicas)
        least = min(1 if asked.min_replicas is None else asked.min_replicas, most)
        return _sized(asked, least, most, (asked.num_gpus or share) if gpus else 0, cpus)

    fleets, trainer = config.fleet, config.trainer
    generators = fleet(fleets.generators, 0.5, 0.3)
    engine = ({"gpu_memory_utilization": 0.3} if gpus else {}) | fleets.generators.engine
    workers = math.gcd(size(trainer.workers or gpus or 1), config.optim.batch_size)
    rank = 0.5 if workers == 1 else 0.51  # Ray may place two halves on one GPU, where two ranks cannot be
    return (
        _ranks(trainer, workers, (trainer.num_gpus or rank) if gpus else 0, 0.5),
        FleetsConfig(
            generators=generators.model_copy(update={"engine": engine}),
            references=fleet(fleets.references, 0.5, 0.1),
            rewards=fleet(fleets.rewards, 0.1, 0.1 if config.reward.model else 0),
        ),
    )


def _cluster(config: RunConfig, gpus: int) -> Sizes:
    """Whole GPUs: one each for live policy and reference, a quarter of all for generators, the rest for the trainer. A
    reward model shares the reference's GPU, or has it alone where the loss needs no reference.
    """
    fleets, trainer = config.fleet, config.trainer
    live = 1 if config.serve.enabled else 0
    sampling = max(1, gpus // 4) if config.online else 0
    scorers = config.reference_workers + bool(config.reward.model)
    left = max(1, gpus - sampling - live - min(scorers, 1))
    workers = trainer.workers or max(n for n in range(1, left + 1) if config.optim.batch_size % n == 0)
    share = 1.0 / max(scorers, 1)

    def fleet(asked: F, each: float, most: int) -> F:
        least = 1 if asked.min_replicas is None else asked.min_replicas
        each = each if asked.num_gpus is None else asked.num_gpus
        return _sized(asked, least, max(asked.max_replicas or most, least, 1), each, 1.0)

    return (
        _ranks(trainer, workers, trainer.num_gpus or 1.0, 1.0),
        FleetsConfig(
            generators=fleet(fleets.generators, 1.0, sampling or live),
            references=fleet(fleets.references, share, 1),
            rewards=fleet(fleets.rewards, share if config.reward.model else 0, 1),
        ),
    )


def _sized(asked: F, least: int, most: int, gpus: float, cpus: float) -> F:
    cpus = cpus if asked.num_cpus is None else asked.num_cpus
    return asked.model_copy(update={"min_replicas": least, "max_replicas": most, "num_gpus": gpus, "num_cpus": cpus})


def _ranks(asked: TrainerConfig, workers: int, gpus: float, cpus: float) -> TrainerConfig:
    least = None if asked.min_workers is None else min(asked.min_workers, workers)
    cpus = cpus if asked.num_cpus is None else asked.num_cpus
    return asked.model_copy(update={"workers": workers, "min_workers": least, "num_gpus": gpus, "num_cpus": cpus})


def _check_transport(transport: str, rank: float, replica: float) -> None:
    """ConfigError where `rank` and `replica`, the GPUs of one of each, rule the transport out."""
    shared = 0 < rank < 1 and 0 < replica < 1
    if transport == "ipc" and not shared:
        raise ConfigError(
            f"publish.transport='ipc' needs trainer and replicas on one GPU, here a rank has {rank:g} and a replica "
            f"{replica:g}; use publish.transport={'broadcast' if rank and replica else 'host'}"
        )
    if transport == "broadcast" and (shared or bool(rank) != bool(replica)):
        raise ConfigError(
            f"publish.transport='broadcast' needs a GPU for each rank and replica, or none for any, here a rank has "
            f"{rank:g} and a replica {replica:g}; use publish.transport={'ipc' if shared else 'host'}"
        )


def _changes(config: RunConfig, trainer: TrainerConfig, fleet: FleetsConfig) -> list[str]:
    """Each size that was given and is another now."""
    named = [
        ("trainer.workers", config.trainer.workers, trainer.workers),
        ("trainer.min_workers", config.trainer.min_workers, trainer.min_workers),
        ("trainer.num_gpus", config.trainer.num_gpus, trainer.num_gpus),
    ]
    for name in FleetsConfig.model_fields:
        asked, sized = getattr(config.fleet, name), getattr(fleet, name)
        named.append((f"fleet.{name}.max_replicas", asked.max_replicas, sized.max_replicas))
        named.append((f"fleet.{name}.min_replicas", asked.min_replicas, sized.min_replicas))
        named.append((f"fleet.{name}.num_gpus", asked.num_gpus, sized.num_gpus))
    return [f"{name}: {before} -> {after}" for name, before, after in named if before is not None and before != after]
