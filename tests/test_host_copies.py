"""Copies of tensors in host memory that is kept."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from sampo_ray.training.host_copies import HostBuffer, with_copies

TENSORS = [
    torch.arange(7, dtype=torch.float32),
    torch.randn(3, 5, dtype=torch.bfloat16),
    torch.tensor(4.0),
    torch.empty(0, 3),
    torch.arange(12.0).view(3, 4).t(),
    torch.tensor([True, False]),
]


def test_copies_have_the_values_and_stay_as_the_tensors_change() -> None:
    tensors = [tensor.clone() for tensor in TENSORS]
    copies = HostBuffer().copies(tensors, list).result()
    for tensor in tensors:
        tensor.zero_()
    for copy, expected in zip(copies, TENSORS, strict=True):
        assert torch.equal(copy, expected) and copy.dtype == expected.dtype


def test_memory_is_taken_once_and_again_only_for_more() -> None:
    buffer = HostBuffer()
    first, again, fewer = (
        buffer.copies(tensors, list).result()[0].data_ptr() for tensors in (TENSORS, TENSORS, TENSORS[:2])
    )
    assert first == again == fewer
    before = buffer.nbytes
    buffer.add(1 << 12)
    assert buffer.nbytes == before + (1 << 12)
    (larger,) = buffer.copies([torch.ones(1 << 20)], list).result()
    assert torch.equal(larger, torch.ones(1 << 20))


def test_each_copy_is_saved_alone(tmp_path: Path) -> None:
    copies = HostBuffer().copies([torch.ones(1 << 18), torch.ones(16)], list).result()
    torch.save(copies[1], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 4096
    assert torch.equal(torch.load(tmp_path / "small.pt"), torch.ones(16))


def test_copies_that_nobody_has_any_more_keep_no_memory() -> None:
    gc.disable()  # in a cycle of references they would stay until it runs, with a buffer that was replaced
    try:
        copies = with_copies({"tensors": TENSORS}, buffer := HostBuffer()).result()["tensors"]
        alive = [weakref.ref(copy) for copy in copies]
        assert len(alive) == len(TENSORS)
        del copies
        buffer.add(1)  # the thread that made them has nothing left to do
        assert not any(each() is not None for each in alive)
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_for_what_comes_from_a_gpu_is_pinned() -> None:
    (copy,) = HostBuffer().copies([torch.arange(1 << 10, device="cuda")], list).result()
    assert copy.is_pinned() and torch.equal(copy, torch.arange(1 << 10))
