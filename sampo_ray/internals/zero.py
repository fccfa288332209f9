"""How ZeRO-3 keeps a parameter, checked with DeepSpeed 0.19.8: flat and padded, each rank an equal part in turn.

What is on the parameters themselves is read here; DeepSpeed, whose import takes seconds, is not needed for that.
"""

import torch
from torch import Tensor


def partition(tensor: Tensor) -> Tensor | None:
    """This rank's part of a parameter, flat; None for a tensor that is here as a whole."""
    part: Tensor | None = getattr(tensor, "ds_tensor", None)
    return part


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter, of which this rank may hold a part."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def whole(parameter: Tensor, parts: Tensor) -> Tensor:
    """The parameter's value from the parts of all ranks [ranks, numel of a part]."""
    shape = whole_shape(parameter)
    return parts.reshape(-1)[: shape.numel()].view(shape)
