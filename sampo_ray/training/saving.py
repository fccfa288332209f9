"""What a version or an export holds of a model, with adapters or without: the tensors that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from sampo_ray.errors import OverflowingWeightsError
from sampo_ray.internals.transformers import CheckpointFormat
from sampo_ray.training.lora import Weight, named_buffers, named_weights


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

    def converted(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same under the names and in the shapes of the checkpoint."""
        return self._format.converted(tensors)


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
