"""The end of a fleet whose driver was killed: on a shared cluster a detached actor does what the driver could not."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from sampo_ray.actors.weights.client import NAMESPACE, find_weight_store
from sampo_ray.internals.ray import job_has_ended
from sampo_ray.internals.serve import begin_delete, serve_status

logger = logging.getLogger(__name__)

LOOK_S, ANSWER_S = 2.0, 60.0


class FleetGuard:
    """Ray actor (detached) that outlives a driver, whose Ray job is `job`, by some seconds.

    Once the driver has ended it takes down the weight store, the Serve applications `FLEET-...` and itself; where some
    applications are kept, the others and itself. A driver that ends in order has left nothing to do.
    """

    def __init__(self, job: str, fleet: str, keeps: Sequence[str], store: str) -> None:
        self._job, self._fleet, self._keeps, self._store = job, fleet, keeps, store
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def _guard(self) -> None:
        while True:
            time.sleep(LOOK_S)
            try:
                if job_has_ended(self._job):
                    self._take_down()
                    return
            except (RayError, RuntimeError) as error:  # the cluster's head or Serve's controller is away
                logger.warning("fleet %s could not be looked after, and will be again: %s", self._fleet, error)

    def _take_down(self) -> None:
        # The store first, since it would start applications of pinned versions again.
        with suppress(ValueError):  # it has ended before
            store = find_weight_store(self._store)
            if self._keeps:
                ray.get(store.give_gpus.remote("engines", 0), timeout=ANSWER_S)  # the driver's ranks may have had them
            else:
                ray.kill(store)
        for name in serve_status().applications:
            if name.startswith(f"{self._fleet}-") and not name.startswith(tuple(self._keeps)):
                begin_delete(name)
        ray.kill(ray.get_runtime_context().current_actor)


def start_guard(fleet: str, keeps: Sequence[str], store: str) -> ActorHandle:
    """Has the fleet of that name end with this driver. `keeps`: how the names of applications begin that stay."""
    name = f"sampo-{fleet}-guard"
    with suppress(ValueError):  # of an earlier driver of the same run, which has just been killed
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    options = {"lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    actor = ray.remote(FleetGuard).options(name=name, namespace=NAMESPACE, **options)
    return actor.remote(ray.get_runtime_context().get_job_id(), fleet, keeps, store)
