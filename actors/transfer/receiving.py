"""The replica's end of a transport (`transport.py`): a replica comes for a version, and its workers receive it."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from typing import Any

import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError

from sampo_ray.actors.transfer.broadcast import BroadcastIncoming
from sampo_ray.actors.transfer.cuda_ipc import IpcIncoming
from sampo_ray.actors.transfer.roll import Member, Ticket
from sampo_ray.actors.transfer.transport import Incoming, beside
from sampo_ray.actors.weights.client import Weights
from sampo_ray.run.buckets import joined

logger = logging.getLogger("ray.serve")

ENLIST_S = 30.0
REPLY_S = 30.0
POLL_S = 0.02
SIDES: dict[str, Callable[[torch.device], Incoming]] = {"broadcast": BroadcastIncoming, "ipc": IpcIncoming}


class Reception:
    """A worker receives a version in a thread, beside the steps of its engine.

    `places` are the start and size of each bucket in `data`, in bytes; starts are multiples of 64. `rank` is the
    worker's in the epoch. An `earlier` reception that goes on beyond its time keeps the next from beginning.
    """

    def __init__(
        self,
        side: Incoming,
        ticket: Ticket,
        rank: int,
        places: Sequence[Sequence[int]],
        device: torch.device,
        earlier: "Reception | None" = None,
    ) -> None:
        self._side, self._ticket, self._rank, self._places, self._device = side, ticket, rank, places, device
        self._until = time.monotonic() + ticket.limit_s
        self.data = torch.empty(0, dtype=torch.uint8)
        """What was received: uint8 [bytes] on the worker's device."""
        self.problem = ""
        """Why it failed; then the worker has left the epoch."""
        self._thread = threading.Thread(target=self._run, name="receive-weights", daemon=True)
        if earlier is None or earlier.done:
            self._thread.start()
        else:
            self.problem = "the version before is still being received"

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with beside(self._device):
                last = self._places[-1]
                data = torch.empty(sum(last), dtype=torch.uint8, device=self._device)
                buffers = [data[start : start + size] for start, size in self._places]
                self._side.receive(self._ticket, self._rank, buffers, self._until)
            self.data = data
        except Exception as error:  # whatever it is, the replica has the host path
            self.problem = f"{type(error).__name__}: {error}"
            self._side.close()


class Receiver:
    """A replica's part: it comes for a version, has its workers receive it, and tells the roll how that went."""

    def __init__(self, client: Any, transport: str, channel: str) -> None:
        """`client` is vLLM's AsyncLLM; `channel` the store's that the replica follows."""
        self._client, self._transport, self._channel = client, transport, channel
        self._member = self._new_member()

    async def receive(self, store: ActorHandle, weights: Weights) -> dict[str, Any] | None:
        """A HostUpdate of what the workers have received and verified; None: the host path is what is left."""
        places, specs = joined(weights.buckets)
        ticket: Ticket | None = None
        try:
            enlisting = store.roll.remote("enlist", self._member, weights.id, ENLIST_S)
            ticket = await asyncio.wait_for(enlisting, ENLIST_S + REPLY_S)
            if ticket is None:
                return None
            problem = await self._received(ticket, places)
            await asyncio.wait_for(store.roll.remote("report", self._member.id, not problem), REPLY_S)
        except (RayError, TimeoutError) as error:
            problem = repr(error)
        if problem:
            logger.warning("%s did not come by %s, so it is fetched: %s", weights.id, self._transport, problem)
            self._member = self._new_member()
            return None
        logger.info("%s came by %s", weights.id, self._transport)
        return {"path": "", "nbytes": sum(places[-1]), "tensors": [astuple(spec) for spec in specs]}

    def leave(self, store: ActorHandle) -> None:
        """Takes a replica that goes off the roll; does not wait for it."""
        store.roll.remote("report", self._member.id, False)

    async def _received(self, ticket: Ticket, places: Sequence[Sequence[int]]) -> str:
        """What went wrong in any of the workers, or ""."""
        await self._client.collective_rpc("receive_version", args=(self._transport, asdict(ticket), places))
        async with asyncio.timeout(ticket.limit_s + REPLY_S):
            while None in (problems := await self._client.collective_rpc("version_received")):
                await asyncio.sleep(POLL_S)
        return "; ".join(filter(None, problems))

    def _new_member(self) -> Member:
        workers = self._client.vllm_config.parallel_config.world_size
        return Member(os.urandom(8).hex(), workers, self._channel)
