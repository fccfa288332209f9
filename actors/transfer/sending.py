"""The trainer's end of a transport (`transport.py`): rank 0 sends the versions it publishes, beside its training."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from sampo_ray.actors.transfer.broadcast import BroadcastOutgoing
from sampo_ray.actors.transfer.cuda_ipc import IpcOutgoing
from sampo_ray.actors.transfer.roll import Epoch
from sampo_ray.actors.transfer.transport import Outgoing, left
from sampo_ray.actors.weights.client import fetch
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.version_folders import WeightsId

logger = logging.getLogger(__name__)

MUSTER_S = 10.0
SEND_S = 20.0
SLOWEST = 200e6
"""Bytes/s; what is sent more slowly is given up."""
REPLY_S = 60.0
SIDES: dict[str, Callable[[torch.device], Outgoing]] = {"broadcast": BroadcastOutgoing, "ipc": IpcOutgoing}


class Sender:
    """Sends versions from the trainer's rank 0, one at a time, in a thread. A failure costs a transfer, never a step.

    `ask(step, *arguments, timeout=...)` has the store's roll take a step. `muster_s`: seconds in which replicas must
    come for a version; `send_s`: seconds that sending it may take, besides those for its bytes.
    """

    def __init__(
        self,
        side: Outgoing,
        ask: Callable[..., Any],
        muster_s: float = MUSTER_S,
        send_s: float = SEND_S,
        fetched: Callable[[Bucket, float], Bucket] = fetch,
    ) -> None:
        self._side, self._ask, self._muster_s, self._send_s, self._fetched = side, ask, muster_s, send_s, fetched
        self._thread = threading.Thread()

    @property
    def free(self) -> bool:
        """Whether the next version can be sent. While one still is, the next takes the host path."""
        return not self._thread.is_alive()

    def send(self, weights: WeightsId, buckets: Sequence[Bucket]) -> None:
        """Starts sending a version that was offered, its buckets as they are in the object store; returns at once."""
        self._thread = threading.Thread(target=self._run, args=(weights, buckets), name="send-weights", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being sent any more, or after a minute."""
        if not self.free:
            self._thread.join(REPLY_S)

    def _run(self, weights: WeightsId, buckets: Sequence[Bucket]) -> None:
        begun = time.monotonic()
        try:
            epoch = self._ask("muster", weights, self._muster_s, timeout=self._muster_s + REPLY_S)
            if epoch is None:
                return
            silent = self._send(weights, buckets, epoch)
            count, took = len(epoch.members), time.monotonic() - begun
            logger.info("sent %s to %d replicas in %.1f s, %d said nothing", weights, count, took, len(silent))
        except Exception as error:  # of a network, a GPU, an actor: replicas have another way, and training goes on
            logger.warning("could not send %s, replicas fetch it themselves: %s", weights, repr(error))

    def _send(self, weights: WeightsId, buckets: Sequence[Bucket], epoch: Epoch) -> list[str]:
        limit = self._send_s + sum(spec.nbytes for bucket in buckets for spec in bucket.specs) / SLOWEST
        until = time.monotonic() + limit
        try:
            here = [self._fetched(bucket, left(until)) for bucket in buckets]
            details = self._side.open(epoch, here, until)
            self._ask("call", weights, left(until), details, timeout=REPLY_S)
            self._side.send(weights.version, here, until)
        except Exception:
            self._side.close(False)  # first, so that nobody waits for what does not come
            self._ask("close", weights, 0.0, False, timeout=REPLY_S)
            raise
        try:
            patience = max(0.0, until - time.monotonic())
            return self._ask("close", weights, patience, True, timeout=patience + REPLY_S)
        finally:
            self._side.close(True)


def start_sender(transport: str, store: ActorHandle, device: torch.device) -> Sender | None:
    """The sender of the trainer's rank 0, whose GPU (or CPU) is `device`; None for the host path, which needs none."""

    def ask(step: str, *arguments: Any, timeout: float) -> Any:
        return ray.get(store.roll.remote(step, *arguments), timeout=timeout)

    return Sender(SIDES[transport](device), ask) if transport in SIDES else None
