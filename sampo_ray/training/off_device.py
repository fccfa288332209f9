"""Takes what a process has on a GPU to host memory and back, for GPUs that others use in between.

A tensor's storage is emptied in place and filled again, so that all views of it stay what they are: parameters,
DeepSpeed's flat buffers and partitions, optimizer states, whichever ZeRO stage and optimizer there are. DeepSpeed's own
`offload_states` (0.19.8) leaves frozen weights where they are and, at stage 3, takes its own compiled FusedAdam alone.
"""

import gc
import logging

import torch
from torch import Tensor, UntypedStorage

from sampo_ray.training.host_copies import HostBuffer

logger = logging.getLogger(__name__)


class OffDevice:
    """The memory of this process's tensors on `device`. Nothing may compute between `take` and `bring_back`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._buffer = device, HostBuffer()
        self._taken: list[tuple[UntypedStorage, Tensor]] = []

    def take(self, keep: bool = True) -> int:
        """Frees the device's memory; returns how many bytes. Does nothing after another `take`. Unless it is to `keep`
        them, the values are lost, and the tensors cannot be used any more.
        """
        if self._taken:
            return 0
        gc.collect()  # what is in reference cycles need not be copied
        storages = storages_on(self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        freed = sum(storage.nbytes() for storage in storages)
        if keep:
            copies = self._buffer.copies([_bytes_of(storage) for storage in storages], list).result()
            self._taken = list(zip(storages, copies, strict=True))
        for storage in storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            logger.info("%.1f GiB of tensors are left on %s", torch.cuda.memory_allocated() / 2**30, self._device)
        return freed

    def bring_back(self) -> None:
        """Puts everything back, if it was taken."""
        taken, self._taken = self._taken, []
        for storage, copy in taken:
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        if taken and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def storages_on(device: torch.device) -> list[UntypedStorage]:
    """The memory on a device that this process's tensors are views of, each once. Not that of others: of another
    process, NumPy or a file, which torch cannot resize."""
    found = dict[int, UntypedStorage]()
    for each in gc.get_objects():
        if not issubclass(type(each), Tensor) or each.layout is not torch.strided:
            continue
        for tensor in (each, each.grad) if each.is_leaf else (each,):
            if tensor is not None and tensor.device == device:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.resizable():
                    found[storage.data_ptr()] = storage
    return list(found.values())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
