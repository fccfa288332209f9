"""Has Ray grant plans: for each plan one placement group an actor, as Ray Serve and Ray Train ask for them, without the
actors, of which 64 would not fit on a machine. Prints one JSON line a plan.

    python -m tests.grants

A process of its own, since the tests' Ray has other nodes.
"""

import contextlib
import json
import sys
from collections.abc import Iterator

import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from sampo_ray.actors.nodes import Where, cluster_now
from sampo_ray.config.packing import Group
from sampo_ray.config.placement import Plan, placement
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.internals.ray_nodes import cluster_use
from tests.waiting import scaled, wait_until

NODES, GPUS, CPUS = (1, 2, 8), 8, 16
OFFLINE = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}, "trainer": {"zero_stage": 3}}
ONLINE = {
    **OFFLINE,
    "data": {"prompts": "d", "max_length": 4096},
    "rounds": {"mode": "online"},
    "reward": {"function": "f.py:f"},
}
CASES: dict[str, tuple[dict[str, object], list[str]]] = {
    "offline": (OFFLINE, []),
    "offline, not served": (OFFLINE, ["serve.enabled=false"]),
    "offline, reference workers": (OFFLINE, ["reference.where=workers"]),
    "online": (ONLINE, []),
    "online, reward model": (ONLINE, ["reward={model: r}", "reference.where=workers"]),
    "online, gates": (ONLINE, ["serve.gates.min_win_rate=0.5"]),
    "online, TP 2": (ONLINE, ["fleet.generators.engine={tensor_parallel_size: 2}"]),
    "online, shared": (ONLINE, ["fleet.placement=shared"]),
}


def bundles_of(group: Group, where: Where) -> list[dict[str, float]]:
    """What one actor asks for; an engine's first worker is beside its replica."""
    first = {"GPU": group.gpus, "CPU": group.cpus, "memory": float(where.memory)}
    bundles = [first, *[{"GPU": group.gpus}] * (group.workers - 1)]
    return [{name: amount for name, amount in each.items() if amount} for each in bundles]


def asked_for(plan: Plan) -> Iterator[PlacementGroup]:
    """A placement group for the ranks, and one for each other actor; all that a plan keeps room for."""
    cluster = cluster_now()
    for group in sorted(plan.groups, key=lambda group: -group.gpus):
        where = Where.of(group, cluster)
        bundles, count = bundles_of(group, where), 1 if group.role == "ranks" else group.kept
        bundles = bundles * (group.kept if group.role == "ranks" else 1)
        labels = [dict(where.labels)] * len(bundles) if where.labels else None
        spread = group.role == "ranks" and group.gpus % 1  # as in actors/ranks/trainer.py
        for _ in range(count):
            asked = placement_group(bundles, "SPREAD" if spread else "PACK", bundle_label_selector=labels)
            if spread:
                asked.wait(scaled(30))  # engines come once ranks are there
            yield asked


def free_gpus() -> float:
    return sum(node.free.get("GPU", 0.0) for node in cluster_use().nodes)


def grant(name: str, config: RunConfig) -> dict[str, object]:
    """What Ray has left once it has granted a plan, and what the plan says of that."""
    plan = placement(config, cluster_now())
    groups = list(asked_for(plan))
    pending = [group for group in groups if not group.wait(scaled(30))]
    expected, ranks = plan.left.gpus, plan.group("ranks")
    with contextlib.suppress(AssertionError):  # what Ray says is some moments old
        wait_until(lambda: pending or abs(free_gpus() - expected) < 0.001, "free GPUs as planned", 10)
    left = free_gpus()
    for group in groups:
        remove_placement_group(group)
    total = sum(node.gpus for node in plan.nodes)
    wait_until(lambda: free_gpus() > total - 0.001, "free GPUs", 30)
    said = {"gpus": total, "case": name, "ranks": ranks.most if ranks else 0, "planned_left": round(expected, 3)}
    return {**said, "left": round(left, 3), "pending": len(pending), "asked": len(groups)}


def main() -> None:
    settings = {"prestart_worker_first_driver": False}
    size = {"num_cpus": CPUS, "num_gpus": GPUS, "object_store_memory": 80_000_000}
    nodes = Nodes(initialize_head=True, head_node_args={**size, "include_dashboard": False, "_system_config": settings})
    try:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        there = 1
        for wanted in NODES:
            for _ in range(wanted - there):
                nodes.add_node(wait=False, **size)
            nodes.wait_for_nodes(timeout=scaled(60))
            there = wanted
            for name, (tree, overrides) in CASES.items():
                sys.stdout.write(json.dumps(grant(name, load_config(tree, overrides))) + "\n")
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main()
