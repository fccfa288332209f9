"""How new weights get into a running vLLM engine: a weight-transfer backend ("host") that reads them from a local file.

The replica stages a version's buckets in one file in memory (`staged_weights`), and every worker of its engine maps
that file; or the workers have received them beforehand (`transport.py`), in the same layout and in memory of their own.
vLLM's workers import this module, because it is named as `worker_extension_cls`; importing it registers the backend.
The file lies on one node, so all workers of an engine must be on the replica's node.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from sampo_ray.actors.transfer.coordinator import TransferPlan
from sampo_ray.actors.transfer.receiving import RECEIVERS, HostUpdate, ReceiveJob
from sampo_ray.actors.transfer.spare_weights import SpareWeights
from sampo_ray.actors.transfer.transport import TransportReceiver
from sampo_ray.actors.weights.client import throttle
from sampo_ray.internals.torch import init_amx
from sampo_ray.internals.vllm import pack_heads
from sampo_ray.run.buckets import Bucket, joined, verify, views

BACKEND = "host"
SHARED_MEMORY = Path("/dev/shm")
PIECE_BYTES = 4 << 20
Fields: TypeAlias = dict[str, Any]
"""A dataclass as vLLM's calls of workers carry it."""


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


@dataclass
class HostInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


class HostWeightTransferEngine(WeightTransferEngine[HostInit, HostUpdate]):
    """Loads a whole checkpoint from the bytes of a HostUpdate. Where `prepare` has loaded it beforehand, it exchanges
    the tensors that the engine computes with; else it loads layer by layer into them.
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
        """See `WorkerExtension.prepare_weights`. On GPUs and for compiled models there is nothing to prepare: graphs
        keep the addresses of the tensors, a compiled model the tensors.
        """
        if update is not None and self.device.type == "cpu" and self.model_config.enforce_eager:
            self._spare = SpareWeights(self.model, self.model_config.dtype)
            self._preparing = self._spare.prepare(self._tensors(self.parse_update_info(update)))
        until = time.perf_counter() + seconds
        return not any(time.perf_counter() > until for _ in self._preparing)

    def receive(self, transport: str, plan: TransferPlan, places: list[list[int]]) -> None:
        """See `WorkerExtension.receive_version`."""
        if self._receiver is None:
            self._receiver = RECEIVERS[transport](self.device)
        rank = plan.rank + self.parallel_config.rank
        self._job = ReceiveJob(self._receiver, plan, rank, places, self.device, self._job)

    def received(self) -> str | None:
        """See `WorkerExtension.version_received`."""
        assert self._job is not None
        return self._job.problem if self._job.done else None

    def release(self) -> None:
        """See `WorkerExtension.release_weights`."""
        self._spare = None
        if self._job is not None and self._job.done:
            self._job = None

    def start_weight_update(self) -> None:
        if self._spare is None:
            # A layer's packed weights no longer have the checkpoint's shapes: this gives the layers those shapes back.
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
        else:
            assert self._job is not None
            data = self._job.data
        return views(update.specs(), data)

    def finish_weight_update(self) -> None:
        if self._spare is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_heads(self.model)

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
    """
    listed = list(buckets)
    room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * sum(b.data.size for b in listed)
    places, specs = joined(listed)
    with tempfile.NamedTemporaryFile(prefix="sampo-weights-", dir=SHARED_MEMORY if room else None) as file:
        for bucket, (start, _) in zip(listed, places, strict=True):
            file.seek(start)
            changed = change(bucket) if change else bucket
            verify(changed, written(changed.data, file, share))
        file.flush()
        yield HostUpdate(file.name, file.tell(), [astuple(spec) for spec in specs])


WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
init_amx()
