"""The second set of weights of an engine on CPUs, on a toy model that packs its weights as vLLM's layers do; and how a
version gets to where the engine reads it.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from sampo_ray.actors.transfer import backend as weight_transfer
from sampo_ray.actors.transfer import spare_weights
from sampo_ray.actors.transfer.backend import staged_weights
from sampo_ray.actors.transfer.spare_weights import SpareWeights, chunks, touched
from sampo_ray.errors import WeightsError
from sampo_ray.run.buckets import pack, views


class Packing(QuantizeMethodBase):
    """Keeps only a transposed copy, which `forward` computes with, unless the weight is needed as it is."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return args[0] @ layer.packed + (layer.bias if layer.bias is not None else 0)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight.T.contiguous()
        if not layer.tied:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Packed(nn.Module):
    def __init__(self, bias: bool, tied: bool = False) -> None:
        super().__init__()
        self.quant_method, self.tied, self.calls = Packing(), tied, 0
        self.weight = nn.Parameter(torch.empty(6, 4), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(6), requires_grad=False) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.quant_method.apply(self, x)


class Toy(nn.Module):
    """Embedding, a packed layer with a bias, a packed layer whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.embed.weight.requires_grad_(False)
        self.inner, self.head = Packed(bias=True), Packed(bias=False, tied=True)
        self.head.weight = self.embed.weight
        record_metadata_for_reloading(self)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        mine, given = dict(self.named_parameters()), dict(tensors)
        for name, tensor in given.items():
            mine[name].data.copy_(tensor)
        return set(given)

    def forward(self) -> torch.Tensor:
        return torch.cat([self.inner(self.embed.weight[:, :4]), self.head(self.embed.weight)], dim=1)


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"embed.weight": (6, 4), "inner.weight": (6, 4), "inner.bias": (6,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def expected(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    e = weights["embed.weight"]
    return torch.cat([e @ weights["inner.weight"].T + weights["inner.bias"], e @ e.T], dim=1)


@pytest.fixture
def toy() -> Toy:
    toy = Toy()
    toy.load_weights(checkpoint(0).items())
    for layer in (toy.inner, toy.head):
        layer.quant_method.process_weights_after_loading(layer)
    return toy


def test_the_old_weights_compute_until_the_new_ones_are_adopted_and_none_of_them_after(toy: Toy) -> None:
    torch.testing.assert_close(toy(), expected(checkpoint(0)))
    for seed in (1, 2):
        before = expected(checkpoint(seed - 1))
        spare = SpareWeights(toy, torch.float32)
        for _ in spare.prepare(checkpoint(seed).items()):
            torch.testing.assert_close(toy(), before)
        spare.adopt()
        torch.testing.assert_close(toy(), expected(checkpoint(seed)))
        assert toy.head.weight is toy.embed.weight
        assert toy.inner.weight.numel() == 0


def test_what_happens_to_a_module_meanwhile_is_kept(toy: Toy) -> None:
    spare = SpareWeights(toy, torch.float32)
    toy()
    for _ in spare.prepare(checkpoint(1).items()):
        toy()
    calls = toy.inner.calls
    assert calls > 1
    spare.adopt()
    assert toy.inner.calls == calls


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_changes_nothing(toy: Toy) -> None:
    lacking = {name: tensor for name, tensor in checkpoint(1).items() if name != "inner.weight"}
    with pytest.raises(WeightsError, match=r"no inner\.weight"):
        list(SpareWeights(toy, torch.float32).prepare(lacking.items()))
    torch.testing.assert_close(toy(), expected(checkpoint(0)))


def test_a_bias_that_is_not_in_the_checkpoint_stays(toy: Toy) -> None:
    new = {name: tensor for name, tensor in checkpoint(1).items() if name != "inner.bias"}
    spare = SpareWeights(toy, torch.float32)
    list(spare.prepare(new.items()))
    spare.adopt()
    torch.testing.assert_close(toy(), expected({**new, "inner.bias": checkpoint(0)["inner.bias"]}))


def test_chunks_keep_order_and_are_of_about_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_weights, "CHUNK_BYTES", 32)
    tensors = [(str(n), torch.zeros(size)) for n, size in enumerate([3, 3, 3, 20, 1, 1])]
    made = list(chunks(tensors))
    assert [tensor for chunk in made for tensor in chunk] == tensors
    assert [[name for name, _ in chunk] for chunk in made] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_the_first_touch_of_a_large_tensor_is_made_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_weights, "CHUNK_BYTES", 32)
    assert [len(list(touched(torch.ones(count)))) for count in (8, 9, 16, 24)] == [0, 1, 1, 2]


def test_what_is_staged_is_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "PIECE_BYTES", 24)
    named = [(str(n), torch.arange(n * 50.0, n * 50 + 30)) for n in range(5)]
    buckets = list(pack(named, 128))
    with staged_weights(buckets, share=0.9) as update:
        assert os.stat(update.path).st_nlink == 0, "it has no name that could stay behind"
        assert torch.equal(torch.from_file(update.path, size=update.nbytes, dtype=torch.uint8)[:4], torch.zeros(4))
        data = torch.frombuffer(bytearray(Path(update.path).read_bytes()), dtype=torch.uint8)
        found = list(views(update.specs(), data))
    assert data.numel() == update.nbytes
    assert [name for name, _ in found] == [name for name, _ in named]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, named, strict=True))
    assert not Path(update.path).exists()


def test_damaged_bytes_are_not_staged() -> None:
    (bucket,) = pack([("w", torch.ones(100))])
    damaged = bucket.data.copy()
    damaged[-1] ^= 1
    with pytest.raises(WeightsError, match="bucket of w: checksum"), staged_weights([replace(bucket, data=damaged)]):
        pass
