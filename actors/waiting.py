"""Waiting for nodes: a line every few seconds that says what Ray has not granted, and an end to it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from sampo_ray.errors import FleetError
from sampo_ray.internals.ray_nodes import ClusterUse, NodeUse, Pending, cluster_use

LINE_S, LOOK_S, POLL_S = 5.0, 1.0, 0.5
MISSING = 1e-4
"""Ray counts in ten-thousandths."""


@dataclass(frozen=True)
class Need:
    """What one actor of a role asks Ray for: a bundle, or several of a placement group. `setting`: what is made smaller
    to ask for less, if anything is. `avoids_head`: the head does not do."""

    role: str
    bundles: tuple[Mapping[str, float], ...]
    setting: str = ""
    avoids_head: bool = False

    def asks(self, bundle: Mapping[str, float]) -> bool:
        return any(_asked(each) == _asked(bundle) for each in self.bundles)


@dataclass(frozen=True)
class Lack:
    """Bundles of one shape that wait for nodes, and whose they are (None: another run's)."""

    need: Need | None
    bundle: Mapping[str, float]
    count: int

    def __str__(self) -> str:
        role = self.need.role if self.need else "others"
        return f"{role} {self.count} x {{{described(self.bundle)}}}"


class Wait:
    """The wait of a start for what its `needs` ask. `limit_s`: how long nothing may change before it ends.

    Others' demand is named, since they may be served first, but it neither starts nor ends the wait.
    """

    def __init__(
        self,
        needs: Sequence[Need],
        note: Callable[[str], None],
        limit_s: float,
        use: Callable[[], ClusterUse] = cluster_use,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._needs, self._note, self._limit_s, self._use, self._clock = [*needs], note, limit_s, use, clock
        self._looked = self._said = clock()
        self._seen: tuple[object, ...] | None = None  # what was missing, and what was there
        self._since = clock()

    def add(self, needs: Sequence[Need]) -> None:
        self._needs += needs

    def look(self) -> bool:
        """Whether something is missing. To be called often while something is not ready: it looks at most once a
        second. FleetError once the same was missing for the limit."""
        now = self._clock()
        if now - self._looked < LOOK_S:
            return self._seen is not None
        self._looked, use = now, self._use()
        lacking = lacks(use, self._needs)
        if not any(lack.need for lack in lacking):
            self._seen, self._said = None, now
            return False
        seen = (tuple(map(str, lacking)), frozenset(node.id for node in use.nodes), dict(use.starting))
        if seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._since >= self._limit_s:
            raise FleetError(given_up(use, lacking, self._limit_s))
        if now - self._said >= LINE_S:
            self._said = now
            self._note(f"waiting for nodes: {'; '.join(map(str, lacking))} ({there(use)})")
        return True

    def get(self, call: ray.ObjectRef, timeout_s: float) -> Any:
        """A call's result within `timeout_s`, in which time without nodes does not count. GetTimeoutError."""
        since = self._clock()
        while not ray.wait([call], timeout=POLL_S)[0]:
            if self.look():
                since = self._clock()
            elif self._clock() - since > timeout_s:
                raise GetTimeoutError(f"no answer within {timeout_s:.0f} s")
        return ray.get(call, timeout=timeout_s)


def lacks(use: ClusterUse, needs: Sequence[Need]) -> list[Lack]:
    """What Ray cannot grant now. Not what it is about to grant: a bundle that some node has room for."""
    asked = [(each, next((need for need in needs if need.asks(each.bundle)), None)) for each in use.pending]
    return [
        Lack(need, each.bundle, each.count)
        for each, need in asked
        if each.together or not _has_room(each, use.nodes, need is not None and need.avoids_head)
    ]


def _has_room(pending: Pending, nodes: Sequence[NodeUse], avoids_head: bool) -> bool:
    return any(
        all(node.free.get(name, 0.0) + MISSING >= amount for name, amount in pending.bundle.items())
        for node in nodes
        if not (avoids_head and node.head)
    )


def there(use: ClusterUse) -> str:
    """What the cluster has, how much of it is free, and which nodes are being started."""
    amounts = []
    for name, unit in (("GPU", "GPUs"), ("CPU", "CPUs")):
        total, free = (sum(part.get(name, 0.0) for part in parts) for parts in _both(use.nodes))
        amounts.append(f"{total:g} {unit}, {free:g} free")
    starting = ", ".join(f"{count} {kind}" for kind, count in sorted(use.starting.items()))
    amounts += [f"being started: {starting}"] if starting else []
    amounts += [f"a node could not be started: {use.failed}"] if use.failed and not starting else []
    return f"{len(use.nodes)} {'node' if len(use.nodes) == 1 else 'nodes'}: {'; '.join(amounts)}"


def _both(nodes: Sequence[NodeUse]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [node.total for node in nodes], [node.free for node in nodes]


def given_up(use: ClusterUse, lacking: Sequence[Lack], limit_s: float) -> str:
    """The message of a start that has waited long enough."""
    own = [lack for lack in lacking if lack.need]
    settings = list(dict.fromkeys(lack.need.setting for lack in own if lack.need and lack.need.setting))
    less = f"or ask for less ({', '.join(settings)}), " if settings else ""
    return (
        f"the cluster lacks what the run asks for, {'; '.join(map(str, own))}, and {limit_s:.0f} s brought nothing "
        f"more ({there(use)}); add nodes, {less}or wait longer (fleet.start_timeout_s={limit_s:g})"
    )


def described(bundle: Mapping[str, float]) -> str:
    """`1 GPU, 0.5 CPU, 16 GiB`."""
    parts = [f"{bundle[name]:g} {name}" for name in ("GPU", "CPU") if bundle.get(name)]
    parts += [f"{bundle['memory'] / 2**30:.3g} GiB"] if bundle.get("memory") else []
    return ", ".join(parts) or "a process"


def _asked(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: round(bundle[name], 4) for name in ("GPU", "CPU", "memory") if bundle.get(name)}
