"""What happens when a training rank fails: which errors would come again, and whether the ranks are started again.

Ray Train's `max_failures` is for a whole run, and it starts ranks again after any error. Here it has no limit, and its
documented callback asks the exchange, which counts failures without a new step between them.
"""

from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train import UserCallback

from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, RankFailure
from sampo_ray.config.run import RunConfig
from sampo_ray.errors import UserError, described, first_line
from sampo_ray.internals.ray import failed_health_check

WRONG = (UserError, ValueError, TypeError, LookupError, AttributeError, ImportError)
"""Errors of data, settings or code: they would come again."""


class RoundAbandoned(Exception):
    """The driver takes no more results of the round."""


def failure_of(error: Exception, config: RunConfig | None) -> RankFailure:
    """What a rank's error means; `config` is that of the run, if the rank has taken a round.

    An error of a remote call (RayError, also where Ray gives it the class of its cause) says nothing about the rank's
    own data: it is never lasting.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return RankFailure(out_of_gpu_memory(error, config), lasting=True)
    lasting = isinstance(error, WRONG) and not isinstance(error, RayError)
    if lasting and isinstance(error, UserError):
        return RankFailure(str(error), lasting)
    cause = error.cause if isinstance(error, RayTaskError) else error
    return RankFailure(described(cause), lasting)


def out_of_gpu_memory(error: torch.OutOfMemoryError, config: RunConfig | None) -> str:
    row = f" (now {config.row_budget.tokens_per_row})" if config else ""
    return (
        f"a training rank is out of GPU memory: {str(error).split('. ')[0]}. Lower trainer.tokens_per_row{row}, which "
        "must hold 2 x data.max_length; or set trainer.gradient_checkpointing=true, trainer.offload=optimizer, "
        "trainer.zero_stage=3 or model.lora.rank"
    )


def cause_of_death(errors: Mapping[int, Exception]) -> str | None:
    """Why a rank's process ended, if one did: the others' errors, of broken connections, come from that."""
    for rank, error in errors.items():
        if (cause := failed_health_check(error)) is error:  # it was raised in a process that lives
            continue
        if isinstance(cause, OutOfMemoryError):
            return (
                f"rank {rank} was killed because its node was out of memory; lower trainer.tokens_per_row or "
                "data.max_length, or give the node's memory to fewer processes (trainer.workers, fleet.*.max_replicas)"
            )
        return f"the process of rank {rank} ended: {first_line(cause)}"
    return None


class StopOrRestart(UserCallback):
    """Ray Train's callback: by raising, it ends a run whose ranks the exchange does not want to be started again.

    The ranks that have not failed, and may wait for the others in a collective, end with the run.
    """

    def __init__(self, exchange: ActorHandle) -> None:
        self._exchange = exchange

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        died = [failed_health_check(error) for error in worker_exceptions.values()]
        planned = any(isinstance(error, RayActorError) and error.preempted for error in died)
        first = next(iter(worker_exceptions.values()))
        reason, other = cause_of_death(worker_exceptions), failure_of(first, None).reason
        again = self._exchange.may_restart.remote(reason, other, counts=not planned)
        if not ray.get(again, timeout=EXCHANGE_ANSWER_S):
            raise RoundAbandoned("the ranks are not started again")
