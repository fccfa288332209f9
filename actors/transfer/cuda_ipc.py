"""The CUDA IPC transport: workers on the GPU of the trainer's rank 0 copy the buckets out of its memory.

Rank 0 holds the buckets on its GPU and hands out IPC handles, which go through the weight store and Ray alone; it keeps
them until every replica has reported, or the limit is over. A worker that reads memory which is no longer kept sees it
by the digest. For as long as a transfer takes it costs the GPU two further copies of the weights, one on each side.

Written against torch's `reduce_tensor` and `rebuild_cuda_tensor`, as vLLM's own IPC engine uses them, and never run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from sampo_ray.actors.transfer.roll import Epoch, Ticket
from sampo_ray.actors.transfer.transport import beside, check_digest, digest, left
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket, flat

HANDLES = slice(7, 10)
"""Of `rebuild_cuda_tensor`'s arguments, those that name memory: handle, size and offset of the storage; ..."""
COUNTERS = slice(11, 15)
"""... and those that count its users, and the event to wait for. The rest follows from its being uint8 [bytes]."""


class IpcOutgoing:
    """Rank 0's side (`transport.Outgoing`)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, list[torch.Tensor]()

    def open(self, epoch: Epoch, buckets: Sequence[Bucket], until: float) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        with beside(self._device):
            for bucket in buckets:
                left(until)
                self._held.append(data := flat(bucket.data).to(self._device))
                # A handle is for one receiver: its end uses up one count of the sender's.
                handles = [plain(reduce_tensor(data)[1]) for _ in range(epoch.world - 1)]
                items.append({"handles": handles, "digest": digest(data)})
        return {"gpu": gpu_uuid(self._device), "buckets": items}

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        """The members do it."""

    def close(self, succeeded: bool) -> None:
        self._held.clear()
        torch.cuda.ipc_collect()


class IpcIncoming:
    """A worker's side (`transport.Incoming`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def receive(self, ticket: Ticket, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        theirs, mine = ticket.details["gpu"], gpu_uuid(self._device)
        if theirs != mine:
            raise WeightsError(f"the trainer's rank 0 is on GPU {theirs}, this worker on {mine}; ipc needs one GPU")
        for number, (buffer, item) in enumerate(zip(buffers, ticket.details["buckets"], strict=True)):
            left(until)
            data = rebuilt(item["handles"][rank - 1], buffer.numel(), self._device)
            buffer.copy_(data)
            check_digest(buffer, item["digest"], number)  # waits for the copy, before which `data` must not go

    def close(self) -> None:
        """Nothing is shared between transfers."""


def plain(arguments: Sequence[Any]) -> list[Any]:
    """What of `rebuild_cuda_tensor`'s arguments for a uint8 [bytes] another process needs: bytes and numbers only."""
    return [*arguments[HANDLES], *arguments[COUNTERS]]


def rebuilt(handles: Sequence[Any], nbytes: int, device: torch.device) -> torch.Tensor:
    """Another process's uint8 [nbytes] on this GPU, from what `plain` made of it."""
    kind: list[Any] = [torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index]
    kind += [*handles[:3], False, *handles[3:]]
    return rebuild_cuda_tensor(*kind)


def gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
