"""How the bytes of a published version get into memory next to an engine's workers, before the engine is paused.

The store stays the truth and replicas pull: a version is durable, and its buckets are in the object store, before it is
announced. Which bytes are loaded, and how (`weight_transfer.py`), does not depend on the transport:

* `host`: the replica fetches the buckets and stages them in one file that its workers map. It needs nothing of what is
  here, works anywhere, and is what the others fall back to.
* `broadcast` (`broadcast.py`): the trainer's rank 0 sends the buckets to all workers over a process group.
* `ipc` (`cuda_ipc.py`): workers on the same GPU as the trainer's rank 0 copy them out of its memory.

Such a transport has two sides, which `sending.py` and `receiving.py` run; `roll.py` brings them together. What is sent
are the buckets in the object store, not the trainer's tensors: those are verified, everybody knows their layout from
the announcement, they do not change while training goes on, and ZeRO-3 need not gather again.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
import xxhash

from sampo_ray.actors.transfer.roll import Epoch, Ticket
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import Bucket

ROW_WORDS = 4096


class Outgoing(Protocol):
    """The trainer's side, used by one thread. Raises whatever goes wrong, before time.monotonic() is `until`."""

    def open(self, epoch: Epoch, buckets: Sequence[Bucket], until: float) -> dict[str, Any]:
        """Gets ready for these members and buckets (fetched and verified); returns the `details` of their tickets."""

    def send(self, version: int, buckets: Sequence[Bucket], until: float) -> None:
        """Sends, once the tickets are out."""

    def close(self, succeeded: bool) -> None:
        """Called when all members have reported, or the limit is over: frees what was held for them."""


class Incoming(Protocol):
    """A worker's side, used by one thread at a time. Raises whatever goes wrong, within the limit."""

    def receive(self, ticket: Ticket, rank: int, buffers: Sequence[torch.Tensor], until: float) -> None:
        """Fills uint8 buffers on the worker's device, one a bucket, each verified: WeightsError for other bytes.

        `rank` is this worker's in the epoch.
        """

    def close(self) -> None:
        """Leaves the epoch; called after a failure, too."""


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream that neither waits for what others compute there nor holds them up; done at the end.

    Always the same one: torch's allocator keeps what was freed for the stream that it was allocated on.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(stream_beside(device)):
        yield
        torch.cuda.current_stream().synchronize()


@cache
def stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def left(until: float) -> float:
    """Seconds until then; TimeoutError when there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the weights were not sent within the limit")
    return seconds


def digest(data: torch.Tensor) -> int:
    """Checksum (64 bits, signed) of uint8 [bytes] that is the same on every device, for the price of two reads.

    The bytes are the 8-byte words of a table of 4,096 columns; hashed are the sums of its rows and of its columns (mod
    2^64, whose order does not matter) and what is left over. A damaged word shows in two sums; words in another order
    show as well. Against damage, not against malice. `data` must begin at a multiple of 8 bytes.
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
