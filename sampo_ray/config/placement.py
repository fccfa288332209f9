"""Where a run's actors go: a plan made from the configuration and from what a cluster has, without Ray.

Ray is asked for what the plan says. A plan is refused in one message, or fits on nodes that are there or may come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sampo_ray.config.machines import Cluster, Growth, Node
from sampo_ray.config.packing import Group, Role, Room, in_order
from sampo_ray.config.plan_text import Lacking, refusal, table, without_room
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sizing import (
    Layout,
    ModelMemory,
    Placed,
    Profile,
    RankMemory,
    changed,
    engine,
    engine_workers,
    filled,
    groups_of,
)
from sampo_ray.errors import ConfigError

__all__ = ["Cluster", "Group", "Growth", "ModelMemory", "Node", "Plan", "RankMemory", "Role", "placement"]

CLUSTER_GPUS = 4
"""From this many GPUs on, ranks, engines and workers have GPUs of their own."""


@dataclass(frozen=True)
class Plan:
    """Actors by role for `nodes`, what they leave of these, and the configuration whose sizes they have."""

    config: RunConfig
    groups: tuple[Group, ...]
    nodes: tuple[Node, ...]
    left: Room

    @property
    def shared(self) -> bool:
        """Whether engines and ranks take turns on the same GPUs."""
        return self.config.fleet.placement == "shared"

    def group(self, role: Role) -> Group | None:
        return next((group for group in self.groups if group.role == role), None)

    def missing(self, cluster: Cluster) -> str | None:
        """What the nodes that are there lack for the run to start, in one line; None where there is room for all."""
        lacking, _ = _placed(self.config, self.groups, cluster.nodes)
        return without_room(lacking, cluster.nodes) if lacking else None

    def table(self) -> str:
        """One line a role, and one of what is left over."""
        return table(self.groups, self.left, self.nodes)


def placement(config: RunConfig, cluster: Cluster, memory: ModelMemory | None = None) -> Plan:
    """The plan of a run on the cluster's nodes, or else on these and those that may come.

    Sizes that are left open are chosen so that every GPU is used; sizes that are given count as they are. ConfigError,
    naming what is asked for, what there is and what to change, where it can never fit.
    """
    if (plan := _plan(config, cluster, memory)) is not None:
        return plan
    raise ConfigError(_refusal(config, cluster))


def _plan(config: RunConfig, cluster: Cluster, memory: ModelMemory | None = None) -> Plan | None:
    for layout, nodes in _layouts(config, cluster):
        sized = _sized(config, layout, nodes)
        groups = groups_of(sized, memory)
        lacking, room = _placed(sized, groups, nodes)
        if not lacking:
            groups += _pinned(sized, room)
            return Plan(sized, tuple(groups), tuple(nodes), room)
    return None


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[tuple[Layout, Sequence[Node]]]:
    """Ways to lay out the run, the best first, each with the nodes that it is for."""
    grown = cluster.grown(CLUSTER_GPUS)
    enough = cluster.gpus >= CLUSTER_GPUS or cluster.gpus == sum(node.gpus for node in grown)
    supplies = [cluster.nodes] if enough or config.profile != "auto" else []
    supplies += [grown] if cluster.growth else []
    for nodes in supplies:
        gpus = sum(node.gpus for node in nodes)
        chosen: Profile = "cluster" if gpus >= CLUSTER_GPUS else "laptop"
        profile = chosen if config.profile == "auto" else config.profile
        limit = (gpus or cluster.cores) if config.profile == "auto" and profile == "laptop" else None
        for placed in _placements(config, profile, gpus):
            each = _cpus_each(nodes, 1 if profile == "cluster" and placed == "split" else 2)
            yield Layout(profile, placed, gpus, each, limit), nodes


def _placements(config: RunConfig, profile: Profile, gpus: int) -> list[Placed]:
    if config.fleet.placement != "auto":
        return [config.fleet.placement]
    if not gpus:
        return ["split"]
    return ["split"]


def _cpus_each(nodes: Sequence[Node], on_each: int) -> float:
    """Logical CPUs for one actor with a GPU: 1, or less where nodes have few, so that CPUs keep no GPU idle."""
    with_gpus = [node for node in nodes if node.gpus]
    room = [(node.cpus - 1) / (on_each * node.gpus) for node in with_gpus if not math.isinf(node.cpus)]
    return max(0.01, min([1.0, *(math.floor(100 * each) / 100 for each in room)]))


def _sized(config: RunConfig, layout: Layout, nodes: Sequence[Node]) -> RunConfig:
    """Every size filled in: a quarter of the GPUs for generators, and ranks on all that are left."""
    workers = engine_workers(config.fleet.generators.engine)
    generators = 1
    if config.online and layout.whole:
        generators = max(1, layout.gpus // 4 // workers)
    elif config.online and layout.placement == "shared":
        generators = max(1, sum(node.gpus // workers for node in nodes))
    if not layout.whole:
        return filled(config, layout, max(1, layout.gpus), generators)
    sized = [filled(config, layout, _ranks_left(config, layout, nodes, count), count) for count in {generators, 1}]
    return next((each for each in sized if not _placed(each, groups_of(each), nodes)[0]), sized[0])


def _ranks_left(config: RunConfig, layout: Layout, nodes: Sequence[Node], generators: int) -> int:
    """Ranks for which the other actors leave room."""
    ranks, *others = groups_of(filled(config, layout, 1, generators))
    _, room = _placed(config, others, nodes)
    if 0 < ranks.gpus <= 0.5:  # Ray may place two on one GPU, where NCCL has no two ranks
        return 1
    count = 0
    while count < 4096 and room.place(ranks):
        count += 1
    return max(1, count)


def _placed(config: RunConfig, groups: Sequence[Group], nodes: Sequence[Node]) -> tuple[Lacking, Room]:
    """The groups of which some actors find no room on the nodes, and the room that is left."""
    room, lacking = Room.of(nodes), dict[Role, tuple[Group, int]]()
    for group in in_order(groups):
        placed = sum(room.place(group) for _ in range(group.kept))
        needed = group.least if group.role == "ranks" else group.kept
        if placed < needed:
            lacking[group.role] = group, group.kept - placed
    return lacking, room


def _pinned(config: RunConfig, room: Room) -> list[Group]:
    """Pinned versions, each of which starts a replica of its own: as many as have room."""
    if not config.serve.enabled:
        return []
    one, count = engine(config, "pinned", 0, 1), 0
    while count < 64 and room.place(one):
        count += 1
    return [replace(one, most=count, spare=True, note="" if count else "there is no room for one")]


def _refusal(config: RunConfig, cluster: Cluster) -> str:
    layout, nodes = next(_layouts(config, cluster))
    sized = _sized(config, layout, nodes)
    groups = groups_of(sized)
    lacking, _ = _placed(sized, groups, nodes)
    return refusal(groups, lacking, nodes, [*_ways_out(config, cluster)][:3])


def _ways_out(config: RunConfig, cluster: Cluster) -> Iterator[str]:
    """Changes that are enough, each alone."""
    if config.trainer.workers and (plan := _plan(changed(config, "trainer.workers", None), cluster)):
        yield f"trainer.workers={plan.config.trainer.workers}"
    changes: list[tuple[str, object]] = [
        ("reference.where", "trainer"),
        ("fleet.placement", "shared"),
        ("fleet.generators.max_replicas", 1),
        ("profile", "laptop"),
        ("serve.enabled", False),
    ]
    for name, value in changes:
        other = changed(config, name, value)
        if other != config and _plan(other, cluster) is not None:
            yield f"{name}={str(value).lower()}"
