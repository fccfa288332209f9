"""Where actors may run: what the Ray cluster has and may grow to, and what an actor asks of its node."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
import torch

from sampo_ray.config.machines import Cluster, Growth, Node
from sampo_ray.config.packing import Group
from sampo_ray.internals.ray_nodes import ANY_NODE, NODE_ID, ClusterUse, NodeKind, NodeUse, cluster_use, node_kinds


def cluster_now() -> Cluster:
    """The nodes of the cluster that this process has joined, whoever uses them, and those that may come."""
    return cluster_of(cluster_use(), node_kinds(), {ray.get_runtime_context().get_node_id(): _gpu_memory()})


def cluster_of(use: ClusterUse, kinds: tuple[NodeKind, ...] | None, gpu_memory: Mapping[str, int]) -> Cluster:
    """`gpu_memory`: bytes of each GPU, by node. Kinds that are not known (None) are one that may be anything.

    A single node has no `memory`: what is not stated to Ray there (`Where.of`) cannot be too much.
    """
    alone = len(use.nodes) == 1 and kinds == ()
    nodes = tuple(
        _node({**each.total, "memory": 0 if alone else each.total.get("memory", 0)}, each, gpu_memory.get(each.id, 0))
        for each in use.nodes
    )
    cores = os.cpu_count() or 1
    if kinds is None:
        return Cluster(nodes, (Growth(Node(), None),), cores)
    there = [each.kind for each in use.nodes]
    limits = {kind.name: None if kind.most is None else max(0, kind.most - there.count(kind.name)) for kind in kinds}
    growth = tuple(Growth(_node(kind.resources), limits[kind.name]) for kind in kinds if limits[kind.name] != 0)
    return Cluster(nodes, growth, cores)


def _node(resources: Mapping[str, float], there: NodeUse | None = None, gpu_memory: int = 0) -> Node:
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    memory, gpu_memory = int(resources.get("memory", 0)), gpu_memory if gpus else 0
    return Node(gpus, cpus, memory, gpu_memory, there.id if there else "", there.head if there else False)


def _gpu_memory() -> int:
    """Bytes of a GPU of this machine."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


@dataclass(frozen=True)
class Where:
    """What an actor asks of its node besides GPUs and CPUs: bytes of memory, and labels, by Ray's selectors. `awaited`:
    no node has the labels yet, and one may come."""

    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    awaited: bool = False

    @classmethod
    def of(cls, group: Group | None, cluster: Cluster) -> "Where":
        """Of a role's actors. On a cluster of one node they ask for nothing: all runs there, and what Ray counts as its
        memory is what was free when it was started."""
        if group is None or (len(cluster.nodes) == 1 and not cluster.growth):
            return cls()
        head = next((node for node in cluster.nodes if node.head), None)
        labels = {NODE_ID: f"!{head.id}"} if head and group.avoids_head else {}
        return cls(group.memory, labels, bool(labels) and len(cluster.nodes) == 1)

    @property
    def memory_option(self) -> dict[str, int]:
        return {"memory": self.memory} if self.memory else {}

    @property
    def options(self) -> dict[str, object]:
        """For an actor, a task, or `ray_actor_options` of a deployment."""
        return {**self.memory_option, **({"label_selector": dict(self.labels)} if self.labels else {})}

    @property
    def lasting_options(self) -> dict[str, object]:
        """For an actor that is to outlive its node: on any node where none with the labels has room. Ray would look for
        one with the labels for ever. While none is there an autoscaler starts it only for what insists on it."""
        insists = self.awaited or not self.labels
        return self.options | ({} if insists else {"fallback_strategy": ANY_NODE})


ANYWHERE = Where()
