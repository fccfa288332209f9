"""What a version or an export holds of a model, with adapters or without: the tensors that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from sampo_ray.errors import OverflowingWeightsError
from sampo_ray.internals.transformers import CheckpointFormat
from sampo_ray.internals.zero import whole_shape
from sampo_ray.training.lora import MATRICES, Weight, file_name, named_buffers, named_weights
from sampo_ray.training.snapshots import Named, Value, WeightFile

FILE_BYTES = 64 << 20


def data_of(parameter: Parameter) -> Tensor:
    return parameter.data


class SavedModel:
    """The tensors of a model's checkpoint, as the model is when they are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        shared = ((name, weight.parameter) for name, weight in named_weights(model))
        self._format = CheckpointFormat(model, [*shared, *named_buffers(model)])

    def tensors(
        self,
        cast: Cast,
        value: Callable[[Parameter], Tensor] = data_of,
        gathered: Callable[[Weight], AbstractContextManager[object]] = lambda weight: nullcontext(),
    ) -> Iterator[tuple[str, Tensor]]:
        """What is saved, by its names in memory: weights with adapters merged in, from the `value` of each part, and
        buffers as they are. A weight is `gathered` until the next is taken. `cast`: to the data type of weights but
        those that transformers keeps in fp32.
        """
        for name, weight in named_weights(self._model):
            if name in self._format:
                with gathered(weight):
                    yield name, cast(name, weight.merged(value), self._format.dtype(name, cast.dtype))
        yield from (each for each in named_buffers(self._model) if each[0] in self._format)

    def files(self, world: int, cast: Cast, nbytes: int = FILE_BYTES) -> list[WeightFile]:
        """What is saved as files of at most `nbytes` (a larger tensor has its own), evenly divided among ranks. What is
        converted together is in one file."""
        weights, buffers = dict(named_weights(self._model)), dict(named_buffers(self._model))

        def parts(group: Sequence[str]) -> list[Tensor]:
            return [part for name in group for part in (weights[name].parts if name in weights else [buffers[name]])]

        def size(group: Sequence[str]) -> int:
            saved = ((weights[name].parameter if name in weights else buffers[name], name) for name in group)
            types = ((each, self._format.dtype(name, cast.dtype)) for each, name in saved)
            return sum(whole_shape(each).numel() * dtype.itemsize for each, dtype in types)

        def made(groups: Sequence[Sequence[str]], value: Value) -> Named:
            def tensor(name: str) -> Tensor:
                if name not in weights:
                    return value(buffers[name])
                return cast(name, weights[name].merged(value), self._format.dtype(name, cast.dtype))

            for group in groups:
                yield from self._format.made_of({name: tensor(name) for name in group})

        groups = self._format.groups
        sizes = [size(group) for group in groups]
        together = [[groups[index] for index in indices] for indices in filled(sizes, nbytes)]
        ranks = divided([sum(map(size, each)) for each in together], world)
        return [
            WeightFile(rank, tuple(part for group in each for part in parts(group)), partial(made, each))
            for rank, each in zip(ranks, together, strict=True)
        ]

    def adapters_file(self, names: Mapping[str, str]) -> WeightFile:
        """The adapters as one file of peft's, which rank 0 writes. `names`: see `lora.adapter_names`."""
        adapters = {names[name]: each.parts[1:] for name, each in named_weights(self._model) if name in names}

        def made(value: Value) -> Named:
            for name, parts in adapters.items():
                for side, part in zip(MATRICES, parts, strict=True):
                    yield file_name(name, side), value(part)

        return WeightFile(0, tuple(part for parts in adapters.values() for part in parts), made)

    def converted(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same under the names and in the shapes of the checkpoint."""
        return self._format.converted(tensors)


def filled(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the sizes, in their order, in lists whose sum is at most `most`, or of one that is larger."""
    lists, end = list[list[int]](), most + 1
    for index, size in enumerate(sizes):
        if end + size > most:
            lists.append([])
            end = 0
        lists[-1].append(index)
        end += size
    return lists


def divided(sizes: Sequence[int], among: int) -> list[int]:
    """Who of so many gets each, so that all get about the same: the largest first, each to who has least."""
    loads, owners = [0] * among, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


class Cast:
    """Casts weights to `dtype`, and counts the values that become infinite (in float16 those beyond 65,504)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._count, self._first = dtype, 0, ""

    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`, if another is given."""
        cast = weight.to(dtype or self.dtype)
        if cast.dtype != weight.dtype and (lost := int((cast.isinf() & weight.isfinite()).sum())):
            self._count, self._first = self._count + lost, self._first or name
        return cast

    def check(self) -> None:
        """OverflowingWeightsError, with what to do, if there were any."""
        if self._count:
            name = str(self.dtype).removeprefix("torch.")
            raise OverflowingWeightsError(
                f"run.export_dtype={name} cannot hold {self._count} of the weights, which would become infinite (the "
                f"first are in {self._first}); set run.export_dtype=bfloat16, which a resumed run accepts"
            )
