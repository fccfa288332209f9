"""The trainer's end of a transport (`transport.py`): rank 0 sends the versions it publishes, beside its training."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import ray
import torch
from ray.actor import ActorHandle

from sampo_ray.actors.transfer.coordinator import TransferGroup
from sampo_ray.actors.transfer.transport import BroadcastSender, IpcSender, TransportSender, seconds_left
from sampo_ray.actors.weights.client import fetch
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.versions import WeightsId

logger = logging.getLogger(__name__)

SLOWEST = 200e6
"""Bytes/s; a slower transfer is given up."""
REPLY_S = 60.0
SENDERS: dict[str, Callable[[torch.device], TransportSender]] = {"broadcast": BroadcastSender, "ipc": IpcSender}


class Transfers(Protocol):
    """The trainer's calls of a TransferCoordinator, which see; each blocks until it is done."""

    def gather(self, weights: WeightsId, timeout_s: float) -> TransferGroup | None: ...
    def start(self, weights: WeightsId, limit_s: float, details: object) -> None: ...
    def finish(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]: ...


class StoreTransfers:
    """`Transfers` of the weight store's coordinator."""

    def __init__(self, store: ActorHandle) -> None:
        self._store = store

    def gather(self, weights: WeightsId, timeout_s: float) -> TransferGroup | None:
        return ray.get(self._store.gather_receivers.remote(weights, timeout_s), timeout=timeout_s + REPLY_S)

    def start(self, weights: WeightsId, limit_s: float, details: object) -> None:
        ray.get(self._store.start_transfer.remote(weights, limit_s, details), timeout=REPLY_S)

    def finish(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]:
        return ray.get(self._store.finish_transfer.remote(weights, timeout_s, succeeded), timeout=timeout_s + REPLY_S)


class Sender:
    """Sends versions from the trainer's rank 0, one at a time, in a thread. A failure costs a transfer, never a step.

    `gather_s`: seconds in which replicas must join for a version; `send_s`: seconds that sending may take, besides
    those for the version's bytes.
    """

    def __init__(
        self,
        side: TransportSender,
        transfers: Transfers,
        gather_s: float = 10.0,
        send_s: float = 20.0,
        fetched: Callable[[Bucket, float], Bucket] = fetch,
    ) -> None:
        self._side, self._transfers, self._fetched = side, transfers, fetched
        self._gather_s, self._send_s = gather_s, send_s
        self._thread = threading.Thread()

    @property
    def free(self) -> bool:
        """Whether the next version can be sent. While one is being sent, the next takes the host path."""
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
            if (group := self._transfers.gather(weights, self._gather_s)) is None:
                return
            silent = self._send(weights, buckets, group)
            found = len(group.replicas), time.monotonic() - begun, len(silent)
            logger.info("sent %s to %d replicas in %.1f s, %d of them did not report", weights, *found)
        except Exception as error:  # of a network, a GPU, an actor: replicas have another way, and training goes on
            logger.warning("could not send %s, replicas fetch it themselves: %s", weights, repr(error))

    def _send(self, weights: WeightsId, buckets: Sequence[Bucket], group: TransferGroup) -> list[str]:
        nbytes = sum(spec.nbytes for bucket in buckets for spec in bucket.specs)
        until = time.monotonic() + self._send_s + nbytes / SLOWEST
        try:
            here = [self._fetched(bucket, seconds_left(until)) for bucket in buckets]
            details = self._side.open(group, here, until)
            self._transfers.start(weights, seconds_left(until), details)
            self._side.send(weights.version, here, until)
        except Exception:
            self._side.close(False)  # first, so that no replica waits for bytes that do not come
            self._transfers.finish(weights, 0.0, False)
            raise
        try:
            return self._transfers.finish(weights, max(0.0, until - time.monotonic()), True)
        finally:
            self._side.close(True)


def start_sender(transport: str, store: ActorHandle, device: torch.device) -> Sender | None:
    """The sender of the trainer's rank 0, whose GPU (or CPU) is `device`; None for the host path, which needs none."""
    return Sender(SENDERS[transport](device), StoreTransfers(store)) if transport in SENDERS else None
