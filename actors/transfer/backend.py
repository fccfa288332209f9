"""The engine's end of a transfer: how new weights get next to the workers of a vLLM engine, and then into it.

The replica stages a version's buckets in one file in memory (`staged_weights`), and every worker of its engine maps
that file; or the workers have received them beforehand (`transport.py`), in the same layout and in memory of their own.
A weight-transfer backend ("host") loads them. vLLM's workers import this module, because it is named as
`worker_extension_cls`; importing it registers the backend. All workers must be on the replica's node, as the file is.
"""

import asyncio
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any, Optional, TypeAlias

import numpy as np
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from tqdm import tqdm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.engine.async_llm import AsyncLLM

from sampo_ray.actors.transfer.coordinator import ReceivingReplica, TransferPlan
from sampo_ray.actors.transfer.spare_weights import SpareWeights
from sampo_ray.actors.transfer.transport import BroadcastReceiver, IpcReceiver, TransportReceiver, side_stream
from sampo_ray.actors.weights.client import Weights, throttle
from sampo_ray.internals.torch import init_amx
from sampo_ray.internals.vllm import base_is_kept, keep_base_beside_adapters, pack_again
from sampo_ray.run.buckets import Bucket, TensorSpec, joined, verify, views

logger = logging.getLogger("ray.serve")

BACKEND = "host"
JOIN_S = 30.0
REPLY_S = 30.0
PIECE_BYTES = 4 << 20
RECEIVERS: dict[str, Callable[[torch.device], TransportReceiver]] = {"broadcast": BroadcastReceiver, "ipc": IpcReceiver}
Fields: TypeAlias = dict[str, Any]
"""A dataclass as vLLM's calls of workers carry it."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """Where an engine's workers find new weights: the file `path` of `nbytes` bytes, or "" for those that they have
    received. `tensors`: fields of the TensorSpecs in it. It travels to the workers as a dict of its fields.
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


class WorkerExtension:
    """Methods that vLLM's workers get besides their own."""

    vllm_config: VllmConfig
    weight_transfer_engine: "HostWeightTransferEngine"

    def prepare_weights(self, update: Fields | None, seconds: float) -> bool:
        """Prepares new weights beside those in use, for about `seconds`; True when all is done.

        `update`, a HostUpdate's fields, begins; None goes on. The next weight update uses what is prepared.
        """
        with set_current_vllm_config(self.vllm_config):
            return self.weight_transfer_engine.prepare(update, seconds)

    def receive_version(self, transport: str, plan: Fields, places: list[list[int]]) -> None:
        """Begins to receive a version in a thread: `plan`, a TransferPlan's fields; `places`, see `ReceiveJob`."""
        self.weight_transfer_engine.receive(transport, TransferPlan(**plan), places)

    def version_received(self) -> str | None:
        """None: not yet; "": received, and the next preparation and update may use it; else what went wrong."""
        return self.weight_transfer_engine.received()

    def release_weights(self) -> None:
        """Frees what the last weight update has replaced; that would take too long in the pause."""
        self.weight_transfer_engine.release()

    def free_bytes(self) -> int:
        """Bytes of the worker's GPU that nobody uses; 0 on a CPU."""
        device = self.weight_transfer_engine.device
        return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0

    def base_is_kept(self) -> bool:
        """Whether adapters leave requests without one alone; for engines with adapters."""
        return base_is_kept(self.weight_transfer_engine.model)


@dataclass
class HostInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


class HostWeightTransferEngine(WeightTransferEngine[HostInit, HostUpdate]):
    """Loads a whole checkpoint from the bytes of a HostUpdate: layer by layer into the tensors that the engine computes
    with or, where `prepare` has loaded it beforehand, by exchanging them. Its calls are those of WorkerExtension.
    """

    init_info_cls = HostInit
    update_info_cls = HostUpdate
    supports_draft_weight_update = False
    _spare: SpareWeights | None = None
    _preparing: Iterator[None] = iter(())
    _receiver: TransportReceiver | None = None
    _job: ReceiveJob | None = None

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def prepare(self, update: Fields | None, seconds: float) -> bool:
        """Nothing to do on GPUs and for compiled models: graphs keep the tensors' addresses, the latter the tensors."""
        if update is not None and self.device.type == "cpu" and self.model_config.enforce_eager:
            self._spare = SpareWeights(self.model, self.model_config.dtype)
            self._preparing = self._spare.prepare(self._tensors(self.parse_update_info(update)))
        until = time.perf_counter() + seconds
        return not any(time.perf_counter() > until for _ in self._preparing)

    def receive(self, transport: str, plan: TransferPlan, places: list[list[int]]) -> None:
        if self._receiver is None:
            self._receiver = RECEIVERS[transport](self.device)
        rank = plan.rank + self.parallel_config.rank
        self._job = ReceiveJob(self._receiver, plan, rank, places, self.device, self._job)

    def received(self) -> str | None:
        assert self._job is not None
        return self._job.problem if self._job.done else None

    def release(self) -> None:
        self._spare = None
        if self._job is not None and self._job.done:
            self._job = None

    def start_weight_update(self) -> None:
        if self._spare is None:  # gives packed layers the checkpoint's shapes back
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Fields) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator even where there is none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdate) -> None:
        if self._spare is None:
            self.model.load_weights(self._tensors(update_info))
        else:
            self._spare.adopt()

    def _tensors(self, update: HostUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        if update.path:
            data = torch.from_file(update.path, shared=False, size=update.nbytes, dtype=torch.uint8)
            return views(update.specs(), data)
        assert self._job is not None
        return views(update.specs(), self._job.data)

    def finish_weight_update(self) -> None:
        if self._spare is None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                pack_again(self.model)

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()


def written(data: np.ndarray, file: IO[bytes], share: float) -> Iterator[np.ndarray]:
    """Writes `data` piece by piece and yields each; the work on a piece takes `share` of the time."""
    for start in range(0, data.size, PIECE_BYTES):
        begun = time.perf_counter()
        piece = data[start : start + PIECE_BYTES]
        file.write(piece.data)
        yield piece
        throttle(begun, share)


@contextmanager
def staged_weights(
    buckets: Iterable[Bucket], share: float = 1.0, change: Callable[[Bucket], Bucket] | None = None
) -> Iterator[HostUpdate]:
    """Verifies fetched buckets and writes what `change` makes of them, at the same places, into one file (in memory
    where there is room); yields where it is. Works no more than `share` of the time. WeightsError for damaged bytes.

    The file has no name, so that it ends with the processes that have it open, also if they are killed.
    """
    listed, memory = list(buckets), Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * sum(bucket.data.size for bucket in listed)
    places, specs = joined(listed)
    with tempfile.TemporaryFile(dir=memory if room else None) as file:
        for bucket, (start, _) in zip(listed, places, strict=True):
            file.seek(start)
            changed = change(bucket) if change else bucket
            verify(changed, written(changed.data, file, share))
        file.flush()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield HostUpdate(path, file.tell(), [astuple(spec) for spec in specs])


class Receiver:
    """A replica's part: it joins for a version of `channel`, has its workers receive it, and reports the result."""

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
                await asyncio.sleep(0.02)
        return "; ".join(filter(None, problems))

    def _new_replica(self) -> ReceivingReplica:
        workers = self._client.vllm_config.parallel_config.world_size
        return ReceivingReplica(os.urandom(8).hex(), workers, self._channel)


WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
init_amx()
keep_base_beside_adapters()
# By default tqdm, with which vLLM shows progress, makes a semaphore: a file in /dev/shm that a killed engine leaves.
tqdm.set_lock(threading.RLock())
