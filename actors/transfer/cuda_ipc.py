"""The CUDA IPC transport: workers on the GPU of the trainer's rank 0 copy the buckets out of its memory.

Rank 0 has the buckets on its GPU and gives out IPC handles, which travel through the weight store and Ray alone. It
keeps the memory until every replica has reported, or the limit is over; a worker that reads memory after that sees it
by the digest. A transfer costs the GPU two more copies of the weights while it runs, one on each side.

Written against torch's `reduce_tensor` and `rebuild_cuda_tensor`, as vLLM's own IPC engine uses them, and never run.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from sampo_ray.actors.transfer.coordinator import TransferGroup, TransferPlan
from sampo_ray.actors.transfer.transport import check_digest, digest, seconds_left, side_stream
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket, flat

HANDLES = slice(7, 10)
"""Of `rebuild_cuda_tensor`'s arguments, those that name memory: handle, size and offset of the storage; ..."""
COUNTERS = slice(11, 15)
"""... and those that count its users, and the event to wait for. The rest follows from its being uint8 [bytes]."""


class IpcBucket(TypedDict):
    """A bucket in rank 0's memory: for each worker what `plain` gives, and its digest."""

    handles: list[list[object]]
    digest: int


class IpcMemory(TypedDict):
    """A version in the memory of a GPU: the `details` of this transport's plans."""

    gpu: str
    buckets: list[IpcBucket]


class IpcSender:
    """Rank 0's side (`TransportSender`)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._shared = device, list[torch.Tensor]()

    def open(self, group: TransferGroup, buckets: Sequence[Bucket], until: float) -> IpcMemory:
        items: list[IpcBucket] = []
        with side_stream(self._device):
            for bucket in buckets:
                seconds_left(until)
                self._shared.append(data := flat(bucket.data).to(self._device))
                # A handle is for one receiver: when that ends, it uses up one count of the sender's.
                handles = [plain(reduce_tensor(data)[1]) for _ in range(group.world - 1)]
                items.append({"handles": handles, "digest": digest(data)})
        return {"gpu": gpu_uuid(self._device), "buckets": items}

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        """Nothing to do: the workers copy."""

    def close(self, succeeded: bool) -> None:
        self._shared.clear()
        torch.cuda.ipc_collect()


class IpcReceiver:
    """A worker's side (`TransportReceiver`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def receive(self, plan: TransferPlan, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        memory: IpcMemory = plan.details
        here = gpu_uuid(self._device)
        if memory["gpu"] != here:
            raise WeightsError(
                f"the trainer's rank 0 is on GPU {memory['gpu']}, this worker on {here}; ipc needs one GPU"
            )
        for number, (buffer, bucket) in enumerate(zip(buffers, memory["buckets"], strict=True)):
            seconds_left(until)
            data = rebuilt(bucket["handles"][rank - 1], buffer.numel(), self._device)
            buffer.copy_(data)
            check_digest(buffer, bucket["digest"], number)  # waits for the copy, which needs `data` until then

    def close(self) -> None:
        """Nothing is shared between transfers."""


def plain(arguments: Sequence[object]) -> list[object]:
    """What of `rebuild_cuda_tensor`'s arguments for a uint8 [bytes] another process needs: bytes and numbers only."""
    return [*arguments[HANDLES], *arguments[COUNTERS]]


def rebuilt(handles: Sequence[object], nbytes: int, device: torch.device) -> torch.Tensor:
    """Another process's uint8 [nbytes] on this GPU, from what `plain` made of it."""
    kind: list[object] = [torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index]
    return rebuild_cuda_tensor(*[*kind, *handles[:3], False, *handles[3:]])


def gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
