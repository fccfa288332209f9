"""The driver's orders on GPUs that engines and training ranks share by time: it knows which stage comes next."""

import logging
import time

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from sampo_ray.actors.weights.turns import Turn
from sampo_ray.errors import StageError

logger = logging.getLogger(__name__)

ASK_S, ANSWER_S = 5.0, 60.0
LIMIT_S = 900.0
"""Until engines that sleep, or end, have left the GPUs; one that starts does so first."""


def give_gpus(store: ActorHandle, turn: Turn, limit_s: float = LIMIT_S) -> None:
    """Gives the GPUs to the engines, which wake by and by, or to the ranks once all engines have left them. StageError
    when these have not within `limit_s`."""
    until = time.monotonic() + limit_s
    while not ray.get(store.give_gpus.remote(turn, ASK_S), timeout=ASK_S + ANSWER_S):
        if time.monotonic() > until:
            raise StageError(
                f"the policy's engines still use the GPUs after {limit_s:.0f} s, so the ranks cannot train; look at "
                "why in Ray's logs, or use fleet.placement=split"
            )


def return_gpus(store: ActorHandle) -> None:
    """Gives the GPUs to engines that go on serving without this driver."""
    try:
        give_gpus(store, "engines")
    except RayError as error:
        logger.warning("the weight store could not be told that the engines may wake: %s", error)
