"""Where a run's actors go: a plan made from the configuration and from what a cluster has, without Ray.

Ray is asked for what the plan says. A plan is refused in one message, or fits on nodes that are there or may come.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sampo_ray.config.gpu_fit import gpu_shares, no_gpu_memory, with_utilization
from sampo_ray.config.machines import Cluster, Node
from sampo_ray.config.packing import Group, Role, Room, in_order
from sampo_ray.config.plan_text import Lacking, refusal, table, without_room
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sizing import (
    Layout,
    ModelMemory,
    Placed,
    Profile,
    changed,
    engine,
    engine_workers,
    filled,
    groups_of,
    not_by_turns,
    value_of,
    with_chosen,
)
from sampo_ray.errors import ConfigError

CLUSTER_GPUS = 4
"""From this many GPUs on, ranks, engines and workers have GPUs of their own."""
TENSOR = "tensor_parallel_size"


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
    against = not_by_turns(config) or _uneven(cluster.nodes)
    if config.fleet.placement == "shared" and against:
        raise ConfigError(f"fleet.placement=shared does not go with {against}; use fleet.placement=split")
    if config.profile == "cluster" and not any(node.gpus for node in cluster.grown()) and not _may_be_any(cluster):
        raise ConfigError("profile='cluster' needs GPUs, and Ray has none; use profile=laptop, or auto")
    if (plan := _plan(config, cluster, memory)) is None:
        raise ConfigError(_refusal(config, cluster, memory))
    return plan


def serving_plan(config: RunConfig, cluster: Cluster) -> Plan:
    """The plan of what serves a run that is not trained here: the live policy, and what it needs. ConfigError where no
    node has room for it."""
    config = changed(config, "fleet.placement", "split")
    gpus = max((node.gpus for node in cluster.nodes), default=0)
    profile: Profile = "cluster" if cluster.gpus >= CLUSTER_GPUS else "laptop"
    layout = Layout(profile if config.profile == "auto" else config.profile, "split", gpus, limit=None)
    sized = with_utilization(filled(config, layout, 1, 1), layout, None)
    groups = [group for group in groups_of(sized) if group.role in ("policy", "store", "endpoint")]
    lacking, room = _packed(groups, cluster.nodes)
    if lacking and not cluster.growth:
        raise ConfigError(refusal(groups, lacking, cluster.nodes, []))
    return Plan(with_chosen(sized, config), tuple(groups), cluster.nodes, room)


def _plan(config: RunConfig, cluster: Cluster, memory: ModelMemory | None = None) -> Plan | None:
    for layout, nodes in _layouts(config, cluster, memory):
        sized = _sized(config, layout, nodes)
        on_gpu = gpu_shares(sized, layout, nodes, memory)
        if on_gpu and not on_gpu.fit:
            continue
        sized = with_utilization(sized, layout, on_gpu)
        groups = groups_of(sized, memory)
        lacking, room = _placed(sized, groups, nodes)
        if not lacking:
            pinned = _pinned(sized, copy.deepcopy(room))
            return Plan(with_chosen(sized, config), (*groups, *pinned), tuple(nodes), room)
    return None


def _layouts(
    config: RunConfig, cluster: Cluster, memory: ModelMemory | None
) -> Iterator[tuple[Layout, Sequence[Node]]]:
    """Ways to lay out the run, the best first, each with the nodes that it is for."""
    for nodes in _supplies(config, cluster):
        gpus = sum(node.gpus for node in nodes)
        chosen: Profile = "cluster" if gpus >= CLUSTER_GPUS else "laptop"
        profile = chosen if config.profile == "auto" else config.profile
        limit = (gpus or cluster.cores) if config.profile == "auto" and profile == "laptop" else None
        known = memory is not None and all(node.gpu_memory for node in nodes if node.gpus)
        for placed in _placements(config, profile, nodes, known):
            each = _cpus_each(nodes, 1 if profile == "cluster" and placed == "split" else 2)
            yield Layout(profile, placed, gpus, each, limit), nodes


def _supplies(config: RunConfig, cluster: Cluster) -> Iterator[Sequence[Node]]:
    """The nodes that are there, unless they are too few while others may come, and all that there may be."""
    if not cluster.growth:
        yield cluster.nodes
        return
    grown = (*cluster.nodes, *_nodes_for(config, cluster)) if _may_be_any(cluster) else cluster.grown(CLUSTER_GPUS)
    more = sum(node.gpus for node in grown) > cluster.gpus
    if cluster.gpus >= CLUSTER_GPUS or not more or (config.profile != "auto" and cluster.gpus):
        yield cluster.nodes
    yield grown


def _may_be_any(cluster: Cluster) -> bool:
    """Whether nodes may come of which it is not known what they have."""
    return any(kind.unknown for kind in cluster.growth)


def _nodes_for(config: RunConfig, cluster: Cluster) -> Iterator[Node]:
    """Nodes for what is given of a run, where it is not known which may come."""
    if config.profile == "laptop" or cluster.gpus >= CLUSTER_GPUS:
        return
    if config.trainer.workers is None:
        raise ConfigError(
            f"trainer.workers: Ray has {cluster.gpus} GPUs and may get nodes, but does not say of which kind; give "
            "trainer.workers (and fleet.generators.max_replicas), which are waited for, or use profile=laptop"
        )
    sized = filled(config, Layout("cluster", "split", 1), config.trainer.workers, 1)
    for group in groups_of(sized):
        yield from [Node(math.ceil(group.gpus_each))] * (math.ceil(group.kept) if group.gpus else 0)


def _uneven(nodes: Sequence[Node]) -> str | None:
    """Why parts of GPUs cannot be had on these nodes, if so: Ray counts those of ranks by a node's sum, and spreads
    ranks evenly over nodes, so that one with fewer GPUs gets two ranks on one."""
    sizes = sorted({node.gpus for node in nodes if node.gpus})
    uneven = len(sizes) > 1 and sum(node.gpus for node in nodes) >= CLUSTER_GPUS
    return f"nodes of {' and '.join(map(str, sizes))} GPUs" if uneven else None


def _placements(config: RunConfig, profile: Profile, nodes: Sequence[Node], known: bool) -> list[Placed]:
    """Side by side or by turns: what is asked for, or what to try, the better first; `known`: memory is looked at."""
    if config.fleet.placement != "auto":
        return [config.fleet.placement]
    turns = not not_by_turns(config) and not _uneven(nodes) and any(node.gpus for node in nodes)
    if not turns or not (config.online or config.serve.enabled):
        return ["split"]
    if profile == "cluster":  # with too few GPUs for the ranks that are given this is said, for it slows both down
        return ["split"] if config.trainer.workers else ["split", "shared"]
    return ["split", "shared"] if known else ["shared", "split"]


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
    counts = dict.fromkeys((generators, 1))
    sized = [filled(config, layout, _ranks_left(config, layout, nodes, count), count) for count in counts]
    return next((each for each in sized if not _placed(each, groups_of(each), nodes)[0]), sized[0])


def _ranks_left(config: RunConfig, layout: Layout, nodes: Sequence[Node], generators: int) -> int:
    """Ranks for which the other actors leave room."""
    ranks, *others = groups_of(filled(config, layout, 1, generators))
    _, room = _placed(config, others, nodes)
    if ranks.gpus <= 0.5:  # Ray may place two on one GPU, where NCCL has no two ranks
        return 1
    count = 0
    while count < 4096 and room.place(ranks):
        count += 1
    while not _placed(config, [replace(ranks, least=count + 1, most=count + 1), *others], nodes)[0]:
        count += 1  # parts of devices may fit in another order
    return max(1, count)


def _placed(config: RunConfig, groups: Sequence[Group], nodes: Sequence[Node]) -> tuple[Lacking, Room]:
    """The groups of which some actors find no room on the nodes, and the room that is left.

    Where ranks end with each round, generators may have their GPUs meanwhile; there is room for each of the two then.
    """
    turns = config.trainer.lifetime == "round" and config.fleet.placement == "split"
    sampling = [group for group in groups if group.role == "generators" and group.gpus and group.least < group.most]
    if not (turns and sampling):
        return _packed(groups, nodes)
    without = [group for group in groups if group.role != "ranks"]
    lacking, _ = _packed(without, nodes)
    training = [replace(group, most=group.least) if group in sampling else group for group in groups]
    also, room = _packed([group for group in training if group.most], nodes)
    return {**also, **lacking}, room


def _packed(groups: Sequence[Group], nodes: Sequence[Node]) -> tuple[Lacking, Room]:
    room, lacking = Room.of(nodes), dict[Role, tuple[Group, int]]()
    for group in in_order(groups):
        placed = sum(room.place(group) for _ in range(group.kept))
        needed = group.least if group.role == "ranks" else group.kept
        if placed < needed:
            lacking[group.role] = group, group.kept - placed
    return lacking, room


def _pinned(config: RunConfig, room: Room) -> list[Group]:
    """Pinned versions, each of which starts a replica of its own: as many as have room, of which eight are counted."""
    if not config.serve.enabled:
        return []
    one, count = engine(config, "pinned", 0, 1), 0
    while count < 8 and room.place(one):
        count += 1
    return [replace(one, most=count, spare=True, note="" if count else "there is no room for one")]


def _refusal(config: RunConfig, cluster: Cluster, memory: ModelMemory | None) -> str:
    """What does not fit, in the layout that comes nearest to what is asked for."""
    layout, nodes = [*_layouts(config, cluster, memory)][-1]
    sized = _sized(config, layout, nodes)
    groups = groups_of(sized, memory)
    lacking, _ = _placed(sized, groups, nodes)
    on_gpu = gpu_shares(sized, layout, nodes, memory)
    if not lacking and on_gpu:
        return no_gpu_memory(sized, on_gpu)
    return refusal(groups, lacking, nodes, [*_ways_out(config, cluster, memory)][:3])


def _ways_out(config: RunConfig, cluster: Cluster, memory: ModelMemory | None) -> Iterator[str]:
    """Changes that are enough, each alone."""
    if config.trainer.workers and (plan := _plan(changed(config, "trainer.workers", None), cluster, memory)):
        yield f"trainer.workers={plan.config.trainer.workers}"
    changes: list[tuple[str, object]] = [
        ("reference.where", "trainer"),
        ("fleet.generators.max_replicas", 1),
        ("serve.enabled", False),
        ("fleet.placement", "shared"),
        ("profile", "laptop"),
        (f"fleet.generators.engine.{TENSOR}", 1),
    ]
    for name, value in changes:
        other = changed(config, name, value)
        if value == "shared" and (not_by_turns(config) or _uneven(cluster.nodes)):
            continue
        if value_of(config, name) not in (value, None) and _plan(other, cluster, memory) is not None:
            yield f"{name}={str(value).lower()}"
