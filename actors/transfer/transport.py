"""How the bytes of a published version get into memory next to an engine's workers, before the engine is paused.

The store stays the truth and replicas pull: a version is durable, and its buckets are in the object store, before it is
announced. Which bytes are loaded, and how (`backend.py`), does not depend on the transport:

* `host`: the replica fetches the buckets and stages them in one file that its workers map. It uses nothing of this
  folder but `backend.py`, works everywhere, and is what the others fall back to.
* `broadcast` (`broadcast.py`): the trainer's rank 0 sends the buckets to all workers over a process group.
* `ipc` (`cuda_ipc.py`): workers on the same GPU as the trainer's rank 0 copy them out of its memory.

Such a transport has two sides, which `sending.py` and `receiving.py` run and `coordinator.py` brings together. They
send the buckets of the object store instead of the trainer's tensors. Those are verified and do not change while
training goes on, every receiver knows their layout from the announcement, and ZeRO-3 need not gather the weights again.

vLLM's own `nccl` and `ipc` engines (vllm/distributed/weight_transfer) cannot take the place of these transports: they
receive into the model's tensors while the engine is paused, with no checksum and no time limit, so a replica that dies
hangs the trainer, and bad bytes are already loaded when they are noticed. Their group is fixed when it is formed, as
autoscaled replicas are not, and they need CUDA, so no test on a CPU could run them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
import xxhash

from sampo_ray.actors.transfer.coordinator import TransferGroup, TransferPlan
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket

ROW_WORDS = 4096


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
    """On a GPU, a stream that neither waits for the computation there nor delays it; synchronised at the end.

    Always the same one, because torch's allocator keeps freed memory for the stream that allocated it.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        yield
        torch.cuda.current_stream().synchronize()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def seconds_left(until: float) -> float:
    """Seconds until time.monotonic() is `until`; TimeoutError when there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the weights were not sent within the limit")
    return seconds


def digest(data: torch.Tensor) -> int:
    """Checksum (64 bits, signed) of uint8 [bytes]: the same on every device, and as cheap as two reads.

    The bytes are taken as 8-byte words in a table of 4,096 columns. Hashed are the sums of its rows and of its columns
    (mod 2^64, whose order does not matter) and the bytes left over. A damaged word shows in two sums, and so do words
    in another order. Against damage, not against malice. `data` must begin at a multiple of 8 bytes.
    """
    whole = data.numel() // (8 * ROW_WORDS) * (8 * ROW_WORDS)
    words = data[:whole].view(torch.int64).view(-1, ROW_WORDS)
    found = xxhash.xxh3_64(seed=data.numel())
    for part in (words.sum(1), words.sum(0), data[whole:]):
        found.update(part.cpu().numpy().tobytes())
    return found.intdigest() - (1 << 63)


def check_digest(data: torch.Tensor, expected: int, bucket: int) -> None:
    """Raises WeightsError unless a bucket's bytes are those that were sent."""
    if (found := digest(data)) != expected:
        raise WeightsError(f"bucket {bucket}: checksum is {found}, expected {expected}; the bytes are damaged")
