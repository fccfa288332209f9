"""The replica's end of a transport (`transport.py`): a replica joins for a version, and its workers receive it."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Optional

import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.v1.engine.async_llm import AsyncLLM

from sampo_ray.actors.transfer.broadcast import BroadcastReceiver
from sampo_ray.actors.transfer.coordinator import ReceivingReplica, TransferPlan
from sampo_ray.actors.transfer.cuda_ipc import IpcReceiver
from sampo_ray.actors.transfer.transport import TransportReceiver, side_stream
from sampo_ray.actors.weights.client import Weights
from sampo_ray.run.buckets import TensorSpec, joined

logger = logging.getLogger("ray.serve")

JOIN_S = 30.0
REPLY_S = 30.0
POLL_S = 0.02
RECEIVERS: dict[str, Callable[[torch.device], TransportReceiver]] = {"broadcast": BroadcastReceiver, "ipc": IpcReceiver}


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """Where an engine's workers find new weights: the file `path` of `nbytes` bytes, or "" for those that they have
    received. `tensors`: fields of the TensorSpecs in it.

    It travels to the workers as a dict of its fields.
    """

    path: str
    nbytes: int
    tensors: list[Any]

    def specs(self) -> Iterator[TensorSpec]:
        return (TensorSpec(*fields) for fields in self.tensors)


class ReceiveJob:
    """A worker receives a version in a thread, beside the steps of its engine.

    `places` are the start and size of each bucket in `data`, in bytes; starts are multiples of 64. `rank` is the
    worker's in the group. While an `earlier` job goes on beyond its time, the next does not begin.
    """

    def __init__(
        self,
        side: TransportReceiver,
        plan: TransferPlan,
        rank: int,
        places: Sequence[Sequence[int]],
        device: torch.device,
        earlier: Optional["ReceiveJob"] = None,
    ) -> None:
        self._side, self._plan, self._rank, self._places, self._device = side, plan, rank, places, device
        self._until = time.monotonic() + plan.limit_s
        self.data = torch.empty(0, dtype=torch.uint8)
        """What was received: uint8 [bytes] on the worker's device."""
        self.problem = ""
        """Why it failed; then the worker has left the group."""
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
            with side_stream(self._device):
                data = torch.empty(sum(self._places[-1]), dtype=torch.uint8, device=self._device)
                buffers = [data[start : start + size] for start, size in self._places]
                self._side.receive(self._plan, self._rank, buffers, self._until)
            self.data = data
        except Exception as error:  # whatever it is, the replica has the host path
            self.problem = f"{type(error).__name__}: {error}"
            self._side.close()


class Receiver:
    """A replica's part: it joins for a version, has its workers receive it, and reports the result.

    `channel` is that of the store that the replica follows.
    """

    def __init__(self, client: AsyncLLM, transport: str, channel: str) -> None:
        self._client, self._transport, self._channel = client, transport, channel
        self._replica = self._new_replica()

    async def receive(self, store: ActorHandle, weights: Weights) -> HostUpdate | None:
        """Says where the workers have what they received and verified; None: only the host path is left."""
        places, specs = joined(weights.buckets)
        try:
            joining = store.join_transfer.remote(self._replica, weights.id, JOIN_S)
            plan: TransferPlan | None = await asyncio.wait_for(joining, JOIN_S + REPLY_S)
            if plan is None:
                return None
            problem = await self._received(plan, places)
            await asyncio.wait_for(store.report_transfer.remote(self._replica.id, not problem), REPLY_S)
        except (RayError, TimeoutError) as error:
            problem = repr(error)
        if problem:
            logger.warning("%s did not come by %s, so it is fetched: %s", weights.id, self._transport, problem)
            self._replica = self._new_replica()
            return None
        logger.info("%s came by %s", weights.id, self._transport)
        return HostUpdate("", sum(places[-1]), [astuple(spec) for spec in specs])

    def leave(self, store: ActorHandle) -> None:
        """Takes a replica that ends out of the store's transfers; does not wait."""
        store.report_transfer.remote(self._replica.id, False)

    async def _received(self, plan: TransferPlan, places: Sequence[Sequence[int]]) -> str:
        """What went wrong in any of the workers, or ""."""
        await self._client.collective_rpc("receive_version", args=(self._transport, asdict(plan), places))
        async with asyncio.timeout(plan.limit_s + REPLY_S):
            while None in (problems := await self._client.collective_rpc("version_received")):
                await asyncio.sleep(POLL_S)
        return "; ".join(filter(None, problems))

    def _new_replica(self) -> ReceivingReplica:
        workers = self._client.vllm_config.parallel_config.world_size
        return ReceivingReplica(os.urandom(8).hex(), workers, self._channel)
