"""How new weights get into a running vLLM engine: a weight-transfer backend ("host") that reads them from a local file.

The replica stages a version's buckets in one file in memory (`staged`), and every worker of its engine maps that file;
or the worker has received them beforehand (`transport.py`), in the same layout and in memory of its own.
vLLM's workers import this module, because it is named as `worker_extension_cls`; importing it registers the backend.
The file lives on one node, so all workers of an engine must be on the replica's node.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from sampo_ray.actors.transfer.receiving import SIDES, Reception
from sampo_ray.actors.transfer.roll import Ticket
from sampo_ray.actors.transfer.spare_weights import SpareWeights
from sampo_ray.actors.transfer.transport import Incoming
from sampo_ray.actors.weights.client import throttle
from sampo_ray.internals.torch import init_amx
from sampo_ray.internals.vllm import pack_heads
from sampo_ray.run.buckets import Bucket, TensorSpec, joined, verify, views

BACKEND = "host"
SHARED_MEMORY = Path("/dev/shm")
PIECE_BYTES = 4 << 20


class WorkerExtension:
    """What vLLM's workers get besides their own methods. They import this module on its account."""

    def prepare_weights(self, update: dict[str, Any] | None, seconds: float) -> bool:
        """Gets on with making new weights ready, for about `seconds`, beside those in use; True when all is done.

        `update`, a HostUpdate's fields, begins; None goes on. What is prepared is taken by the next weight update.
        """
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            return self.weight_transfer_engine.prepare(update, seconds)  # type: ignore[attr-defined]

    def receive_version(self, transport: str, ticket: dict[str, Any], places: list[list[int]]) -> None:
        """Begins to receive a version in a thread: `ticket`, a Ticket's fields; `places`, see `Reception`."""
        self.weight_transfer_engine.receive(transport, Ticket(**ticket), places)  # type: ignore[attr-defined]

    def version_received(self) -> str | None:
        """None: not yet; "": it is here, and the next preparation and update may take it; else what went wrong."""
        return self.weight_transfer_engine.received()  # type: ignore[attr-defined]

    def release_weights(self) -> None:
        """Frees what the last weight update has replaced; that takes too long for a pause."""
        self.weight_transfer_engine.release()  # type: ignore[attr-defined]


@dataclass
class HostInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """`path`: file of `nbytes` bytes, or "" for those that the worker received; `tensors`: the TensorSpecs in it."""

    path: str
    nbytes: int
    tensors: list[Any]


class HostWeightTransferEngine(WeightTransferEngine[HostInit, HostUpdate]):
    """Loads a whole checkpoint from such bytes: where `prepare` was called before and could, by exchanging what the
    engine computes with; else layer by layer into its tensors.
    """

    init_info_cls = HostInit
    update_info_cls = HostUpdate
    supports_draft_weight_update = False
    _spare: SpareWeights | None = None
    _preparing: Iterator[None] = iter(())
    _incoming: Incoming | None = None
    _reception: Reception | None = None

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def prepare(self, update_info: dict[str, Any] | None, seconds: float) -> bool:
        """See `WorkerExtension.prepare_weights`. Done at once where there is nothing that it could do: a GPU's graphs
        keep the addresses of the tensors, a compiled model the tensors.
        """
        if update_info is not None and self.device.type == "cpu" and self.model_config.enforce_eager:
            self._spare = SpareWeights(self.model, self.model_config.dtype)
            self._preparing = self._spare.prepare(self._tensors(self.parse_update_info(update_info)))
        until = time.perf_counter() + seconds
        return not any(time.perf_counter() > until for _ in self._preparing)

    def receive(self, transport: str, ticket: Ticket, places: list[list[int]]) -> None:
        """See `WorkerExtension.receive_version`."""
        if self._incoming is None:
            self._incoming = SIDES[transport](self.device)
        rank = ticket.rank + self.parallel_config.rank
        self._reception = Reception(self._incoming, ticket, rank, places, self.device, self._reception)

    def received(self) -> str | None:
        assert self._reception is not None
        return self._reception.problem if self._reception.done else None

    def release(self) -> None:
        self._spare = None
        if self._reception is not None and self._reception.done:
            self._reception = None

    def start_weight_update(self) -> None:
        if self._spare is None:
            # A layer's packed weights no longer have the checkpoint's shapes: this gives the layers those shapes back.
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator even where there is none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdate) -> None:
        if self._spare is None:
            self.model.load_weights(self._tensors(update_info))
        else:
            self._spare.adopt()

    def _tensors(self, update_info: HostUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        if update_info.path:
            data = torch.from_file(update_info.path, shared=False, size=update_info.nbytes, dtype=torch.uint8)
        else:
            assert self._reception is not None
            data = self._reception.data
        return views((TensorSpec(*fields) for fields in update_info.tensors), data)

    def finish_weight_update(self) -> None:
        if self._spare is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_heads(self.model)

    def shutdown(self) -> None:
        if self._incoming is not None:
            self._incoming.close()


def written(data: np.ndarray, file: Any, share: float) -> Iterator[np.ndarray]:
    """Writes `data` piece by piece and yields each; all that is done with one takes `share` of the time."""
    for start in range(0, data.size, PIECE_BYTES):
        begun = time.perf_counter()
        piece = data[start : start + PIECE_BYTES]
        file.write(piece)
        yield piece
        throttle(begun, share)


@contextmanager
def staged(
    buckets: Iterable[Bucket], share: float = 1.0, change: Callable[[Bucket], Bucket] | None = None
) -> Iterator[dict[str, Any]]:
    """Verifies buckets (their bytes fetched) and writes what `change` makes of them, at the same places, into one file,
    in memory where there is room; yields the HostUpdate. Works no more than `share` of the time. WeightsError for
    damaged bytes.
    """
    held = list(buckets)
    room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * sum(b.data.size for b in held)
    places, specs = joined(held)
    with tempfile.NamedTemporaryFile(prefix="sampo-weights-", dir=SHARED_MEMORY if room else None) as file:
        for bucket, (start, _) in zip(held, places, strict=True):
            file.seek(start)
            changed = change(bucket) if change else bucket
            verify(changed, written(changed.data, file, share))
        file.flush()
        yield {"path": file.name, "nbytes": file.tell(), "tensors": [astuple(spec) for spec in specs]}


WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
init_amx()
