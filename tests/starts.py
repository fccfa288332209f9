"""Starts on a Ray that lacks GPUs: one that gets them from a node that joins, one that gives up; and a weight store
whose node goes. Prints a JSON line.

    python -m tests.starts

A process of its own, since the tests' Ray has other nodes.
"""

import json
import sys
import tempfile
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster as Nodes

from sampo_ray.actors.nodes import Where, cluster_now
from sampo_ray.actors.ranks.trainer import Trainer, resources_of
from sampo_ray.actors.waiting import Need, Wait
from sampo_ray.actors.weights.store import STORE_CPUS, start_weight_store
from sampo_ray.config.packing import Group
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import FleetError
from sampo_ray.internals.ray_nodes import cluster_use
from sampo_ray.loop.starting import needs_of, run_apps
from sampo_ray.run.storage import Place
from tests.waiting import scaled, wait_until

SIZE = {"num_cpus": 4, "object_store_memory": 80_000_000}


class Replica:
    """Stands in for an engine."""


def start_with_a_node_that_comes(nodes: Nodes) -> tuple[Any, dict[str, object]]:
    """A node with a GPU; what was said and when, and what became of the application once that had joined."""
    begun, said, lacking = time.monotonic(), list[tuple[float, str]](), threading.Event()

    def note(text: str) -> None:
        said.append((time.monotonic() - begun, text))
        lacking.set()

    apps = {"r-policy": serve.deployment(Replica, ray_actor_options={"num_cpus": 0.5, "num_gpus": 1}).bind()}
    thread = threading.Thread(target=run_apps, args=(apps, Wait(needs_of(apps), note, scaled(120))))
    thread.start()
    assert lacking.wait(scaled(60))
    node = nodes.add_node(num_gpus=1, **SIZE)  # only in the main thread
    thread.join()
    status = serve.status().applications["r-policy"].status
    serve.shutdown()
    return node, {"said_after_s": said[0][0], "said": said[0][1], "status": status}


def start_that_gives_up() -> dict[str, object]:
    """Why ranks that lack GPUs are given up, and how long it takes to close their trainer."""
    config = TrainerConfig(workers=3, num_cpus=0.5, num_gpus=1)
    wait = Wait([Need("ranks", (resources_of(config),), "trainer.workers")], lambda text: None, 3.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, "none", Place(folder), wait)
        reason = ""
        try:
            trainer.await_ranks()
        except FleetError as error:
            reason = str(error)
        begun = time.monotonic()
        trainer.close()
    return {"ranks": reason, "closed_after_s": time.monotonic() - begun}


def store_whose_node_goes(nodes: Nodes, node: Any) -> dict[str, object]:
    """Where the weight store runs, and where after its node is gone."""
    group = Group("store", 1, 1, cpus=STORE_CPUS, memory=1 << 30, avoids_head=True)
    with tempfile.TemporaryDirectory() as folder:
        store = start_weight_store("starts", f"{folder}/store.json", where=Where.of(group, cluster_now()))
        ray.get(store.attach.remote("run", f"{folder}/run/versions"), timeout=scaled(60))
        on_head = [head_is_used()]
        nodes.remove_node(node, allow_graceful=False)
        wait_until(lambda: len(cluster_use().nodes) == 1, "the end of the node", 60)
        place = ray.get(store.place.remote(), timeout=scaled(60))
        wait_until(head_is_used, "the store on the head", 10)  # what Ray says is some moments old
        ray.kill(store)
        return {"on_head": [*on_head, True], "place": place, "attached": f"{folder}/run"}


def head_is_used() -> bool:
    (head,) = [node for node in cluster_use().nodes if node.head]
    return head.free["memory"] < head.total["memory"]


def main() -> None:
    nodes = Nodes(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
    try:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        node, found = start_with_a_node_that_comes(nodes)
        found |= store_whose_node_goes(nodes, node)
        sys.stdout.write(json.dumps(found | start_that_gives_up()) + "\n")
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main()
