"""Whether actors fit on nodes, by node and device as Ray places them: a fraction of a GPU lies on one device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sampo_ray.config.machines import Node

Role: TypeAlias = Literal[
    "ranks",
    "policy",
    "generators",
    "references",
    "rewards",
    "pinned",
    "store",
    "exchange",
    "endpoint",
    "base publish",
    "tokenizing",
    "tasks",
]
EPSILON = 1e-6
"""Sums of fractions are compared up to this."""


@dataclass(frozen=True)
class Group:
    """Actors of one role, `least` to `most` of them.

    One has `workers` processes with `gpus` GPUs each (an engine's tensor and pipeline parallelism; they are bundles of
    one placement group), `cpus` logical CPUs and `memory` bytes of its node in all, and takes `gpu_memory` bytes of
    each GPU; 0 where that is small or not known. `avoids_head`: not on the head node if there are others, and then Ray
    is asked for its memory. `spare`: it starts only where there is room, and none is kept for it.
    """

    role: Role
    least: int
    most: int
    gpus: float = 0.0
    workers: int = 1
    cpus: float = 0.0
    memory: int = 0
    gpu_memory: int = 0
    avoids_head: bool = False
    spare: bool = False
    note: str = ""

    @property
    def kept(self) -> int:
        """For how many of them there must be room: all on GPUs, which are not shared; on CPUs those that must run."""
        if self.spare:
            return 0
        return self.most if self.gpus else max(1, self.least)

    @property
    def gpus_each(self) -> float:
        """GPUs of one actor."""
        return self.workers * self.gpus


@dataclass
class _Free:
    """What is left of a node."""

    node: Node
    devices: list[float]
    cpus: float
    memory: float
    alone: bool
    """Whether there are no nodes besides the head."""

    @classmethod
    def of(cls, node: Node, alone: bool) -> _Free:
        return cls(node, [1.0] * node.gpus, node.cpus, node.memory or float("inf"), alone)

    def takes(self, group: Group) -> bool:
        """Whether it has the CPUs and the memory of one."""
        if group.avoids_head and self.node.head and not self.alone:
            return False
        enough = self.memory >= group.memory or not group.avoids_head or self.alone
        return enough and self.cpus + EPSILON >= group.cpus

    def give(self, group: Group) -> None:
        """Takes the CPUs and the memory of one."""
        self.cpus -= group.cpus
        self.memory -= group.memory if group.avoids_head else 0

    def devices_for(self, gpus: float, but: Collection[int]) -> list[int]:
        """The devices that one worker with `gpus` gets: whole ones, or the fullest that has room for a fraction."""
        if gpus > 1 - EPSILON:
            whole = [at for at, free in enumerate(self.devices) if free > 1 - EPSILON]
            return whole[: round(gpus)] if len(whole) >= round(gpus) else []
        roomy = [at for at, free in enumerate(self.devices) if free + EPSILON >= gpus and at not in but]
        return sorted(roomy, key=lambda at: self.devices[at])[:1]

    def workers(self, gpus: float, limit: int) -> int:
        """How many workers of one actor with `gpus` each have room, up to `limit`; each has devices of its own."""
        if not gpus:
            return limit
        if gpus > 1 - EPSILON:
            return min(limit, sum(free > 1 - EPSILON for free in self.devices) // round(gpus))
        return min(limit, sum(free + EPSILON >= gpus for free in self.devices))

    def take(self, gpus: float, workers: int) -> int:
        """Gives up to so many workers of one actor their devices; how many got them."""
        taken = set[int]()
        count = self.workers(gpus, workers)
        for _ in range(count):
            found = self.devices_for(gpus, taken)
            taken.update(found)
            for at in found:
                self.devices[at] -= min(gpus, 1.0)
        return count


@dataclass
class Room:
    """Nodes with what is left of them while groups are placed."""

    free: list[_Free]
    spread: set[Role] = field(default_factory=set)
    """Roles of which an actor's workers are on several nodes, as no node has room for all."""

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Room:
        heads = [node for node in nodes if node.head]
        return cls([_Free.of(node, alone=len(heads) == len(nodes)) for node in nodes])

    @property
    def gpus(self) -> float:
        """GPUs that are left, fractions of devices included."""
        return sum(sum(each.devices) for each in self.free)

    @property
    def alone(self) -> bool:
        """Whether there are no nodes besides the head."""
        return all(each.alone for each in self.free)

    @property
    def whole_gpus(self) -> int:
        return sum(free > 1 - EPSILON for each in self.free for free in each.devices)

    @property
    def cpus(self) -> float:
        return sum(each.cpus for each in self.free)

    def place(self, group: Group) -> bool:
        """Takes the room of one actor of a group: workers on one node where possible. False where there is none."""
        able = [each for each in self.free if each.takes(group)]
        if not group.gpus:
            # Ray, too, keeps what needs no GPU off nodes with some, as long as there are others.
            chosen = min(able, key=lambda each: (bool(each.node.gpus), -each.cpus), default=None)
        else:
            fitting = [each for each in able if each.workers(group.gpus, group.workers) == group.workers]
            chosen = min(fitting, key=lambda each: sum(each.devices), default=None)
        if chosen is None:
            return self._place_over_nodes(group, able) if group.gpus and group.workers > 1 else False
        if group.gpus:
            chosen.take(group.gpus, group.workers)
        chosen.give(group)
        return True

    def _place_over_nodes(self, group: Group, able: Sequence[_Free]) -> bool:
        """The workers of one actor on several nodes, as few as possible."""
        kept, left = [[*each.devices] for each in self.free], group.workers
        first = max(able, key=lambda each: each.workers(group.gpus, left), default=None)
        for each in sorted(self.free, key=lambda each: -each.workers(group.gpus, group.workers)):
            left -= each.take(group.gpus, left) if left else 0
        if left or first is None:
            for each, devices in zip(self.free, kept, strict=True):
                each.devices = devices
            return False
        first.give(group)
        self.spread.add(group.role)
        return True


def in_order(groups: Iterable[Group]) -> list[Group]:
    """Groups in the order in which they are placed: what needs most GPUs on one node first, fractions after whole ones,
    then what needs none, the smallest first, so that what lacks room is worth naming."""

    def key(group: Group) -> tuple[float, float]:
        return (-group.gpus_each if group.gpus >= 1 else -group.gpus / 2), group.cpus

    return sorted(groups, key=key)
