"""Starts on a Ray that lacks GPUs: one that gets them from a node that joins, one that gives up. Prints a JSON line.

    python -m tests.starts

A process of its own, since the tests' Ray has other nodes.
"""

import json
import sys
import tempfile
import threading
import time

import ray
from ray import serve
from ray.cluster_utils import Cluster as Nodes

from sampo_ray.actors.ranks.trainer import Trainer, resources_of
from sampo_ray.actors.waiting import Need, Wait
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import FleetError
from sampo_ray.loop.starting import needs_of, run_apps
from sampo_ray.run.storage import Place
from tests.waiting import scaled

SIZE = {"num_cpus": 4, "object_store_memory": 80_000_000}


class Replica:
    """Stands in for an engine."""


def start_with_a_node_that_comes(nodes: Nodes) -> dict[str, object]:
    """What was said and when, and what became of the application once a node with a GPU had joined."""
    begun, said, lacking = time.monotonic(), list[tuple[float, str]](), threading.Event()

    def note(text: str) -> None:
        said.append((time.monotonic() - begun, text))
        lacking.set()

    apps = {"r-policy": serve.deployment(Replica, ray_actor_options={"num_cpus": 0.5, "num_gpus": 1}).bind()}
    thread = threading.Thread(target=run_apps, args=(apps, Wait(needs_of(apps), note, scaled(120))))
    thread.start()
    if lacking.wait(scaled(60)):
        nodes.add_node(num_gpus=1, **SIZE)  # only in the main thread
    thread.join()
    status = serve.status().applications["r-policy"].status
    serve.shutdown()
    return {"said_after_s": said[0][0], "said": said[0][1], "status": status}


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


def main() -> None:
    nodes = Nodes(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
    try:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        found = start_with_a_node_that_comes(nodes)
        sys.stdout.write(json.dumps(found | start_that_gives_up()) + "\n")
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main()
