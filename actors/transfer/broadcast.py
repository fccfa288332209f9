"""The broadcast transport: rank 0 sends every bucket to all workers of a group's replicas, over one process group.

The group is made for this alone, apart from torch's default group, DeepSpeed's and vLLM's: NCCL between GPUs, gloo
between CPUs. Its ranks meet at a TCP store that rank 0 opens on a free port of its node; like any rendezvous of torch
it is for the cluster's own network. Before each bucket goes a header: version, number, size and digest.

Tested over gloo. Never run over NCCL: there every worker needs a GPU with no other rank of the group on it, and room
beside the engine for a second copy of the model's weights. The limit there is on the wait for an operation instead of
the operation itself, because NCCL's watchdog ends a process in which an operation outlasts its own limit.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypedDict

import ray
import torch
import torch.distributed as dist

from sampo_ray.actors.transfer.coordinator import TransferGroup, TransferPlan
from sampo_ray.actors.transfer.transport import check_digest, digest, seconds_left, side_stream
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket, flat

CONNECT_S = 10.0


class Rendezvous(TypedDict):
    """Where the ranks of a group meet: the `details` of this transport's plans."""

    host: str
    port: int


class BroadcastGroup:
    """A process group in which this process is `rank` of `world`. Forming it waits for all others, within the limit.

    They meet in `store` first, because NCCL forms its group with the first operation and would wait without a limit.
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
    """Rank 0's side (`TransportSender`). The process group is kept until its replicas change or something fails."""

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
    """A worker's side (`TransportReceiver`)."""

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
