"""Profiles: the sizes of a run that its configuration leaves open, chosen for the machines that Ray has."""

from collections.abc import Mapping
from dataclasses import replace

from sampo_ray.config.machines import Cluster
from sampo_ray.config.placement import Plan, placement
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.sections import FleetConfig, FleetsConfig
from sampo_ray.config.sizing import ModelMemory, reopened
from sampo_ray.errors import ConfigError


def resolve(config: RunConfig, resources: Mapping[str, float], cores: int) -> tuple[RunConfig, list[str]]:
    """The configuration with every open size filled in for one machine, and notes on sizes that were reduced.

    `resources` are those of Ray (CPU, GPU), `cores` the real cores of this machine. See `plan_for`.
    """
    plan, notes = plan_for(config, Cluster.of(resources, cores))
    return plan.config, notes


def plan_for(config: RunConfig, cluster: Cluster, memory: ModelMemory | None = None) -> tuple[Plan, list[str]]:
    """The plan of a run on a cluster, with its whole configuration, and notes on sizes that are not those given.

    Sizes that an earlier plan chose are chosen anew: a run may go on with more GPUs, or fewer. ConfigError where it
    cannot fit, where the weight transport cannot work between trainer and replicas as they are placed, or where the
    sizes do not go with the rest.
    """
    plan = placement(reopened(config), cluster, memory)
    found, notes = _checked(config, plan)
    return replace(plan, config=found), notes


def _checked(config: RunConfig, plan: Plan) -> tuple[RunConfig, list[str]]:
    found = plan.config
    trainer, generators = found.trainer, found.fleet.generators
    _check_transport(config.publish.transport, trainer.num_gpus or 0, generators.num_gpus or 0)
    notes = [f"{change} ({found.profile} profile)" for change in _changes(config, found)]
    return load_config(found.model_dump()), notes


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


def _changes(asked: RunConfig, found: RunConfig) -> list[str]:
    """Each size that was given and is another now."""
    named = [
        (f"trainer.{size}", getattr(asked.trainer, size), getattr(found.trainer, size))
        for size in ("workers", "min_workers", "num_gpus")
    ]
    for name in FleetsConfig.model_fields:
        before, after = getattr(asked.fleet, name), getattr(found.fleet, name)
        if isinstance(before, FleetConfig):
            for size in ("max_replicas", "min_replicas", "num_gpus"):
                named.append((f"fleet.{name}.{size}", getattr(before, size), getattr(after, size)))
    return [
        f"{name}: {before:g} -> {after:g}" for name, before, after in named if before is not None and before != after
    ]
