"""The broadcast transport: rank 0 sends every bucket to all workers of an epoch's replicas, over one process group.

The group is made for this alone, apart from torch's default group, DeepSpeed's and vLLM's: NCCL between GPUs, gloo
between CPUs. An epoch has a rendezvous of its own, a TCP store that rank 0 opens on a free port of its node; like any
rendezvous of torch it is for the cluster's own network. Before each bucket goes a header: its number, size and digest.

Run over gloo. Never run over NCCL: there every worker needs a GPU on which no other rank of the group is, and a second
copy of the model's weights must fit beside the engine. The limit is then on the wait for an operation, not its own,
because NCCL's watchdog ends a process in which an operation outlasts its own.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from sampo_ray.actors.transfer.roll import Epoch, Ticket
from sampo_ray.actors.transfer.transport import beside, check_digest, digest, left
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket, flat

CONNECT_S = 10.0


class Group:
    """A process group in which this process is `rank` of `world`. Forming it waits for all others, within the limit.

    They meet in `store` first, because NCCL, which forms its group with the first operation, would wait without one.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, device: torch.device, until: float) -> None:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{each}" for each in range(world)], timedelta(seconds=left(until)))
        self._on_gpu = device.type == "cuda"
        self._backend: Any
        if self._on_gpu:
            self._backend = dist.ProcessGroupNCCL(store, rank, world, dist.ProcessGroupNCCL.Options())
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=left(until)))

    def broadcast(self, tensor: torch.Tensor, until: float) -> None:
        """Rank 0's tensor to all. RuntimeError (torch's) when a rank has gone, or the limit is over."""
        limit = timedelta(seconds=left(until))
        self._backend.broadcast(tensor, 0, timeout=None if self._on_gpu else limit).wait(limit)

    def close(self) -> None:
        """Ends it for the others, too: they see the connection go, whatever still refers to this object here."""
        backend, self._backend = self._backend, None
        backend.abort()


class BroadcastOutgoing:
    """Rank 0's side (`transport.Outgoing`). The group is kept as long as the epoch and until something fails."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._epoch = device, Epoch(0, ())
        self._store: dist.TCPStore | None = None
        self._group: Group | None = None

    def open(self, epoch: Epoch, buckets: Sequence[Bucket], until: float) -> dict[str, Any]:
        if self._store is None or epoch != self._epoch:
            self.close(False)
            host, limit = ray.util.get_node_ip_address(), timedelta(seconds=left(until))
            self._epoch = epoch
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        return {"host": self._store.host, "port": self._store.port}

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        with beside(self._device):
            if self._group is None:
                assert self._store is not None
                self._group = Group(self._store, 0, self._epoch.world, self._device, until)
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


class BroadcastIncoming:
    """A worker's side (`transport.Incoming`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._joined: tuple[Any, ...] = ()
        self._group: Group | None = None

    def receive(self, ticket: Ticket, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        group = self._join(ticket, rank, until)
        for number, buffer in enumerate(buffers):
            header = torch.zeros(4, dtype=torch.int64, device=self._device)
            group.broadcast(header, until)
            *found, expected = header.tolist()
            if found != (wanted := [ticket.version, number, buffer.numel()]):
                raise WeightsError(
                    f"[version, bucket, bytes] is {found}, expected {wanted}; it is not what was announced"
                )
            group.broadcast(buffer, until)
            check_digest(buffer, expected, number)

    def close(self) -> None:
        if self._group:
            self._group.close()
        self._group, self._joined = None, ()

    def _join(self, ticket: Ticket, rank: int, until: float) -> Group:
        wanted = (ticket.epoch, ticket.details["host"], ticket.details["port"])
        if self._group is None or wanted != self._joined:
            self.close()
            _, host, port = wanted
            limit = timedelta(seconds=min(CONNECT_S, left(until)))
            store = dist.TCPStore(host, port, wait_for_workers=False, timeout=limit)
            self._group, self._joined = Group(store, rank, ticket.world, self._device, until), wanted
        return self._group
