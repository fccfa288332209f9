"""What a Ray cluster has and what it may grow to, as records: for plans, which need no running Ray."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine as Ray counts it: GPUs, logical CPUs, and bytes of `memory` and of each GPU's (0: not known)."""

    gpus: int = 0
    cpus: float = math.inf
    memory: int = 0
    gpu_memory: int = 0
    id: str = ""
    head: bool = False


@dataclass(frozen=True)
class Growth:
    """Nodes of one kind that an autoscaler may still add; `count` is None where it is not known how many."""

    node: Node
    count: int | None = None

    @property
    def unknown(self) -> bool:
        """Whether it is not known what such a node has."""
        return self.count is None and not self.node.gpus and math.isinf(self.node.cpus)


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, those that may come, and the real `cores` of this machine."""

    nodes: tuple[Node, ...]
    growth: tuple[Growth, ...] = ()
    cores: int = 1

    @classmethod
    def of(cls, resources: Mapping[str, float], cores: int) -> "Cluster":
        """One node with `resources` as Ray names them (CPU, GPU, memory)."""
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", math.inf)
        return cls((Node(gpus, cpus, int(resources.get("memory", 0)), id="here", head=True),), cores=cores)

    @property
    def gpus(self) -> int:
        """GPUs of the nodes that are there."""
        return sum(node.gpus for node in self.nodes)

    def grown(self, gpus: int = 0) -> tuple[Node, ...]:
        """The nodes that are there and those that may come: of a kind whose count is not known as many as it takes to
        have `gpus` GPUs in all, and one at least."""
        nodes = [*self.nodes]
        for kind in (kind for kind in self.growth if kind.count is not None):
            nodes += [kind.node] * (kind.count or 0)
        for kind in (kind for kind in self.growth if kind.count is None):
            lacking = gpus - sum(node.gpus for node in nodes)
            nodes += [kind.node] * max(1, -(-lacking // kind.node.gpus) if kind.node.gpus else 1)
        return tuple(nodes)
