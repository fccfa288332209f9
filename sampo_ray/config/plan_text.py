"""A plan as people read it: a table for a terminal of 80 columns, and lines about what has no room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from sampo_ray.config.machines import Node
from sampo_ray.config.packing import Group, Role, Room

NAMES: dict[Role, str] = {
    "ranks": "ranks",
    "policy": "live policy",
    "generators": "generators",
    "references": "reference",
    "rewards": "reward",
    "pinned": "pinned versions",
    "store": "weight store",
    "exchange": "exchange",
    "endpoint": "endpoint",
    "base publish": "base publish",
    "tokenizing": "tokenizing",
}
SINGULAR: dict[Role, str] = {"ranks": "rank", "generators": "generator", "pinned": "pinned version"}
HEADINGS = ("actors", "count", "GPUs", "CPUs", "memory", "where")
WIDTHS = (16, 7, 6, 6, 10)
Lacking = Mapping[Role, tuple[Group, int]]
"""Groups of which some actors have no room, and how many of them."""


def table(groups: Iterable[Group], room: Room, nodes: Sequence[Node]) -> str:
    """One line a role and one of what is left over; GPUs, CPUs and memory are those of one actor."""
    lines = [_line(HEADINGS), *(_line(_cells(group, room)) for group in groups)]
    gpus, cpus = room.gpus, room.cpus
    where = "" if gpus < 1 else f"{room.whole_gpus} whole GPUs are not used"
    lines.append(_line(("left over", "", _number(gpus), _number(cpus), "", where)))
    return "\n".join(line.rstrip() for line in lines)


def _line(cells: Sequence[str]) -> str:
    *columns, last = cells
    return "".join(cell.ljust(width) for cell, width in zip(columns, WIDTHS, strict=True)) + last


def _cells(group: Group, room: Room) -> tuple[str, ...]:
    count = f"{group.most}" if group.least == group.most else f"{group.least}..{group.most}"
    memory = f"{group.memory / 2**30:.1f} GiB" if group.memory else ""
    return NAMES[group.role], count, _number(group.gpus_each), _number(group.cpus), memory, _where(group, room)


def _where(group: Group, room: Room) -> str:
    if group.workers > 1 and group.gpus:
        place = "GPUs of several nodes" if group.role in room.spread else "GPUs of one node"
    elif group.gpus:
        place = "a GPU each" if group.gpus == 1 else "part of a GPU" if group.gpus < 1 else "GPUs of one node"
    else:
        place = "not the head" if group.avoids_head and not room.alone else ""
    if not group.most:
        return group.note
    taken = f"{group.gpu_memory / 2**30:.1f} GiB of it" if group.gpu_memory else ""
    return ", ".join(part for part in (place, taken, group.note) if part)


def _number(value: float) -> str:
    return "" if math.isinf(value) else f"{value:.2f}".rstrip("0").rstrip(".")


def refusal(groups: Sequence[Group], lacking: Lacking, nodes: Sequence[Node], ways_out: Sequence[str]) -> str:
    """What is asked for, what there is, what has no room, and the changes that are enough, each alone."""
    gpus, there = sum(group.gpus_each * group.kept for group in groups), sum(node.gpus for node in nodes)
    cpus, cores = sum(group.cpus * group.kept for group in groups), sum(node.cpus for node in nodes)
    each = ", ".join(_asked(group) for group in groups if group.gpus and group.kept)
    about_gpus = any(group.gpus for group, _ in lacking.values())
    asks = f"{gpus:g} GPU{'s' * (gpus != 1)} ({each})" if about_gpus else f"{cpus:.3g} CPUs"
    have = f"{there} GPU{'s' * (there != 1)}" if about_gpus else f"{cores:g} CPUs"
    on = "" if len(nodes) == 1 else f" on {len(nodes)} nodes"
    on_nodes = any(group.gpus or group.avoids_head for group, _ in lacking.values())
    use = " or ".join(ways_out) or ("smaller sizes, or other nodes" if on_nodes else "Ray with more --num-cpus")
    return f"this run asks for {asks}, Ray has {have}{on}: no room for {without_room(lacking, nodes)}; use {use}"


def _asked(group: Group) -> str:
    name = NAMES[group.role] if group.kept > 1 else SINGULAR.get(group.role, NAMES[group.role])
    return f"{group.kept} {name}" + ("" if group.gpus_each == 1 else f" with {group.gpus_each:g} each")


def without_room(lacking: Lacking, nodes: Sequence[Node]) -> str:
    """Groups of which some have no room, and what these need, in one line."""
    gpus = sum(group.gpus_each * count for group, count in lacking.values())
    cpus = sum(group.cpus * count for group, count in lacking.values())
    memory = max((group.memory for group, _ in lacking.values() if group.avoids_head), default=0)
    small = any(node.memory >= memory or not node.memory for node in nodes if len(nodes) == 1 or not node.head)
    needs = [f"{gpus:g} GPUs"] * bool(gpus) + [f"{cpus:.3g} CPUs"] * bool(cpus)
    needs += [] if small else [f"{memory / 2**30:.1f} GiB of memory on a node that is not the head"]
    who = ", ".join(f"{NAMES[role]} ({count} of {group.kept})" for role, (group, count) in lacking.items())
    return f"{who}, which {'needs' if len(lacking) == 1 else 'need'} {', '.join(needs)}"
