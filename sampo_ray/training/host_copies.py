"""Copies of tensors in host memory that is kept for the next ones.

Memory that a process touches for the first time costs several times what the copy itself does, and the more where it is
pinned. So a buffer is taken once, at the size that is needed, and written again and again. Copies are made in a thread,
beside what does not write to the tensors: forward and backward passes leave weights, masters and moments as they are.
"""

import contextlib
import io
import mmap
import pickle
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

ALIGNMENT = 64
T = TypeVar("T")


class HostBuffer:
    """Host memory for copies of tensors; the copies of the last call are overwritten by the next.

    It is pinned where the tensors come from a GPU: registered as it is, since torch's allocator of pinned memory may
    round up to a power of two.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._unpin: Callable[[], object] = lambda: None
        self._pinned = False
        self._thread = ThreadPoolExecutor(1, "copies")

    @property
    def nbytes(self) -> int:
        """Of the memory that it has."""
        return len(self._memory) if self._memory is not None else 0

    def add(self, nbytes: int) -> None:
        """Takes so much more memory than it has, and writes all of it for the first time."""
        self._wait()
        memory = self._at_least(self.nbytes + nbytes, self._pinned)
        torch.frombuffer(memory, dtype=torch.uint8).zero_()

    def copies(self, tensors: Sequence[Tensor], made: Callable[[list[Tensor]], T]) -> Future[T]:
        """Begins to copy the tensors; nothing may write to them until there is a result.

        That is what is `made` of their values on the CPU, contiguous. Each has a storage of its own, so that torch.save
        writes what it holds and nothing beside it.
        """
        self._wait()
        starts, end = list[int](), 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        memory = self._at_least(end, device is not None)
        stream = None if device is None else torch.cuda.Stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))

        def copied() -> T:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                copies = [_copy(memory, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
            if stream is not None:
                stream.synchronize()
            return made(copies)

        return self._thread.submit(copied)

    def _wait(self) -> None:
        """Returns when nothing is being copied any more, and the thread holds nothing of it."""
        self._thread.submit(lambda: None).result()

    def _at_least(self, nbytes: int, pinned: bool) -> mmap.mmap:
        if self._memory is None or len(self._memory) < nbytes:
            self._unpin()
            self._memory = None  # the system has it back before the larger one is taken
            self._memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pinned = pinned
            if pinned:
                self._unpin = finalizer = weakref.finalize(self, _pin(self._memory))
                finalizer.atexit = False  # CUDA may be gone by then
        return self._memory


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's values as uint8 [bytes], without a copy where they are contiguous. One value may have any stride,
    which a view of other element sizes refuses."""
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _copy(memory: mmap.mmap, start: int, tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return view.copy_(tensor.detach(), non_blocking=True)


def _pin(memory: mmap.mmap) -> Callable[[], object]:
    """Pins the memory, and returns what unpins it."""
    runtime, address = torch.cuda.cudart(), torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, len(memory), 0))
    return lambda: runtime.cudaHostUnregister(address)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and gives those that are the same memory one number."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors, self._numbers = list[Tensor](), dict[tuple[object, ...], int]()

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        tensors = self.tensors
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (len(tensors),)
        if key not in self._numbers:
            self._numbers[key] = len(tensors)
            tensors.append(value)
        return self._numbers[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def with_copies(state: T, buffer: HostBuffer) -> Future[T]:
    """A copy of what torch.save takes, its tensors in `buffer`: nothing of it changes any more. Tensors that are the
    same memory, as tied weights are, are copied once; they may hold no attributes of their own. See `copies`."""
    pickler = _Pickler(file := io.BytesIO())
    pickler.dump(state)
    file.seek(0)

    def made(copies: list[Tensor]) -> T:
        state: T = _Unpickler(file, copies).load()
        return state

    return buffer.copies(pickler.tensors, made)
