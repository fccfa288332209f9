"""How the bytes of a published version get into memory next to an engine's workers, before the engine is paused.

The store stays the truth and replicas pull: a version is durable, and its buckets are in the object store, before it is
announced. Which bytes are loaded, and how (`backend.py`), does not depend on the transport:

* `host`: the replica fetches the buckets and stages them in one file that its workers map. It uses nothing of this
  file, works everywhere, and is what the others fall back to.
* `broadcast`: the trainer's rank 0 sends the buckets to all workers over a process group.
* `ipc`: workers on the same GPU as the trainer's rank 0 copy them out of its memory.

The last two have two sides, which `sending.py` and `backend.py` run and `coordinator.py` brings together. They send the
buckets of the object store instead of the trainer's tensors. Those are verified and do not change while training goes
on, every receiver knows their layout from the announcement, and ZeRO-3 need not gather the weights again.

vLLM's own `nccl` and `ipc` engines (vllm/distributed/weight_transfer) cannot take the place of these transports: they
receive into the model's tensors while the engine is paused, with no checksum and no time limit, so a replica that dies
hangs the trainer, and bad bytes are already loaded when they are noticed. Their group is fixed when it is formed, as
autoscaled replicas are not, and they need CUDA, so no test on a CPU could run them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, TypedDict

import ray
import torch
import torch.distributed as dist
import xxhash
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from sampo_ray.actors.transfer.coordinator import TransferGroup, TransferPlan
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket, flat

CONNECT_S = 10.0
ROW_BYTES = 8 * 4096


class TransportSender(Protocol):
    """The trainer's side, used by one thread. Raises whatever goes wrong, before time.monotonic() is `until`."""

    def open(self, group: TransferGroup, buckets: Sequence[Bucket], until: float) -> object:
        """Prepares for these replicas and buckets (fetched and verified); returns the `details` of their plans."""

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        """Sends, once the replicas have their plans."""

    def close(self, succeeded: bool) -> None:
        """Frees what was kept for the replicas. Called when all have reported, or the limit is over."""


class TransportReceiver(Protocol):
    """A worker's side, used by one thread at a time. Raises whatever goes wrong, within the limit."""

    def receive(self, plan: TransferPlan, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        """Fills uint8 buffers on the worker's device, one a bucket, each verified: WeightsError for other bytes.

        `rank` is this worker's in the group.
        """

    def close(self) -> None:
        """Leaves the group; called after a failure, too."""


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream that neither waits for the computation there nor delays it; synchronised at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        yield
        torch.cuda.current_stream().synchronize()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one, because torch's allocator keeps freed memory for the stream that allocated it."""
    return torch.cuda.Stream(device)


def seconds_left(until: float) -> float:
    """Seconds until time.monotonic() is `until`; TimeoutError when there are none."""
    if (seconds := until - time.monotonic()) <= 0:
        raise TimeoutError("the weights were not sent within the limit")
    return seconds


def digest(data: torch.Tensor) -> int:
    """Checksum (64 bits, signed) of uint8 [bytes]: the same on every device, and as cheap as two reads.

    The bytes are taken as 8-byte words in a table of 4,096 columns. Hashed are the sums of its rows and of its columns
    (mod 2^64, whose order does not matter) and the bytes left over. A damaged word shows in two sums, and so do words
    in another order. Against damage, not against malice. `data` must begin at a multiple of 8 bytes.
    """
    whole = data.numel() // ROW_BYTES * ROW_BYTES
    words = data[:whole].view(torch.int64).view(-1, ROW_BYTES // 8)
    found = xxhash.xxh3_64(seed=data.numel())
    for part in (words.sum(1), words.sum(0), data[whole:]):
        found.update(part.cpu().numpy().tobytes())
    return found.intdigest() - (1 << 63)


def check_digest(data: torch.Tensor, expected: int, bucket: int) -> None:
    """Raises WeightsError unless a bucket's bytes are those that were sent."""
    if (found := digest(data)) != expected:
        raise WeightsError(f"bucket {bucket}: checksum is {found}, expected {expected}; the bytes are damaged")


class Rendezvous(TypedDict):
    """Where the ranks of a group meet: the `details` of a plan of `broadcast`."""

    host: str
    port: int


class BroadcastGroup:
    """A process group in which this process is `rank` of `world`: NCCL between GPUs, gloo between CPUs.

    It is made for this alone, apart from torch's default group, DeepSpeed's and vLLM's. Its ranks meet in a TCP store
    that rank 0 opens on a free port of its node; like any rendezvous of torch it is for the cluster's own network. They
    do so first, because NCCL forms its group with the first operation and would wait without a limit.

    Tested over gloo. Never run over NCCL: there every worker needs a GPU with no other rank of the group on it, and
    room beside the engine for a second copy of the model's weights. The limit there is on the wait for an operation
    instead of the operation itself, because NCCL's watchdog ends a process in which an operation outlasts its own.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, device: torch.device, until: float) -> None:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{each}" for each in range(world)], timedelta(seconds=seconds_left(until)))
        self._on_gpu = device.type == "cuda"
        self._backend: Any  # torch's types lack what the groups of both kinds have
        if self._on_gpu:
            self._backend = dist.ProcessGroupNCCL(store, rank, world, dist.ProcessGroupNCCL.Options())
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=seconds_left(until)))

    def broadcast(self, tensor: torch.Tensor, until: float) -> None:
        """Rank 0's tensor to all. RuntimeError (torch's) when a rank has gone, or the limit is over."""
        limit = timedelta(seconds=seconds_left(until))
        self._backend.broadcast(tensor, 0, timeout=None if self._on_gpu else limit).wait(limit)

    def close(self) -> None:
        """Ends the group for the others, too: their connections close, even if something here still refers to it."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort()


class BroadcastSender:
    """Rank 0's side. The process group is kept until its replicas change or something fails.

    Before each bucket goes a header: version, number, size and digest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._replicas = device, TransferGroup(0, ())
        self._store: dist.TCPStore | None = None
        self._group: BroadcastGroup | None = None

    def open(self, group: TransferGroup, buckets: Sequence[Bucket], until: float) -> Rendezvous:
        if self._store is None or group != self._replicas:
            self.close(False)
            host, limit = ray.util.get_node_ip_address(), timedelta(seconds=seconds_left(until))
            self._replicas = group
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        return {"host": self._store.host, "port": self._store.port}

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        with side_stream(self._device):
            if self._group is None:
                assert self._store is not None
                self._group = BroadcastGroup(self._store, 0, self._replicas.world, self._device, until)
            for number, bucket in enumerate(buckets):
                data = flat(bucket.data).to(self._device)
                header = torch.tensor([version, number, data.numel(), digest(data)], device=self._device)
                self._group.broadcast(header, until)
                self._group.broadcast(data, until)

    def close(self, succeeded: bool) -> None:
        if succeeded:
            return
        if self._group:
            self._group.close()
        self._group = self._store = None


class BroadcastReceiver:
    """A worker's side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: BroadcastGroup | None = None
        self._number, self._rendezvous = 0, Rendezvous(host="", port=0)

    def receive(self, plan: TransferPlan, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        group = self._join(plan, rank, until)
        for number, buffer in enumerate(buffers):
            header = torch.zeros(4, dtype=torch.int64, device=self._device)
            group.broadcast(header, until)
            *found, expected = header.tolist()
            if found != (wanted := [plan.version, number, buffer.numel()]):
                raise WeightsError(
                    f"[version, bucket, bytes] is {found}, expected {wanted}; it is not what was announced"
                )
            group.broadcast(buffer, until)
            check_digest(buffer, expected, number)

    def close(self) -> None:
        if self._group:
            self._group.close()
        self._group = None

    def _join(self, plan: TransferPlan, rank: int, until: float) -> BroadcastGroup:
        where: Rendezvous = plan.details
        if self._group is None or (plan.group, where) != (self._number, self._rendezvous):
            self.close()
            limit = timedelta(seconds=min(CONNECT_S, seconds_left(until)))
            store = dist.TCPStore(where["host"], where["port"], wait_for_workers=False, timeout=limit)
            self._group = BroadcastGroup(store, rank, plan.world, self._device, until)
            self._number, self._rendezvous = plan.group, where
        return self._group


class IpcBucket(TypedDict):
    """A bucket in rank 0's memory: for each worker what `plain` gives, and its digest."""

    handles: list[list[object]]
    digest: int


class IpcMemory(TypedDict):
    """A version in the memory of a GPU: the `details` of a plan of `ipc`."""

    gpu: str
    buckets: list[IpcBucket]


class IpcSender:
    """Rank 0's side: has the buckets on its GPU and gives out IPC handles, through the weight store and Ray alone.

    It keeps the memory until every replica has reported, or the limit is over; a worker that reads memory after that
    sees it by the digest. A transfer costs the GPU two more copies of the weights while it runs, one on each side.
    Written against torch's `reduce_tensor` and `rebuild_cuda_tensor`, as vLLM's own IPC engine uses them; never run.
    """

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
    """A worker's side."""

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
    """What of `rebuild_cuda_tensor`'s arguments for a uint8 [bytes] another process needs: bytes and numbers only.

    These are handle, size and offset of the storage, then what counts its users, and the event to wait for.
    """
    return [*arguments[7:10], *arguments[11:15]]


def rebuilt(handles: Sequence[object], nbytes: int, device: torch.device) -> torch.Tensor:
    """Another process's uint8 [nbytes] on this GPU, from what `plain` made of it."""
    kind: list[object] = [torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index]
    return rebuild_cuda_tensor(*[*kind, *handles[:3], False, *handles[3:]])


def gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
