"""From hidden states to token log-probabilities, only at the positions that are asked for, in tiles.

Neither forward nor backward ever holds a [tokens, vocabulary] tensor: rows are taken a tile at a time and computed
again in the backward pass. Tiles have a fixed shape, so that a row's result does not depend on how many others are
asked for.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def tile_rows(device: torch.device) -> int:
    """Rows of one tile: enough to keep the device busy, few enough that a tile of a 128k vocabulary is below 1 GB."""
    return 64 if device.type == "cpu" else 1024


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Weight:
    """The head's weight as the tile products want it: fp32 products on CPU, bf16 products with fp32 sums on GPU.

    On CPU all tiles of a call share one buffer, and so `logits` is good until it is called again: a tile of a large
    vocabulary is tens of megabytes, which the C library's allocator keeps for every thread that ever asked, in pieces,
    or asks the kernel for each time. (A reference worker grew to 4 GB on a model of 16 million parameters.)
    """

    def __init__(self, weight: Tensor) -> None:
        self.dtype = _accumulator(weight.dtype)
        self.on_cpu = weight.device.type == "cpu"
        self.weight = weight.to(self.dtype) if self.on_cpu else weight
        self._tile = weight.new_empty(0, dtype=self.dtype)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if self.on_cpu or left.dtype == right.dtype == self.dtype:
            return left.to(self.dtype) @ right.to(self.dtype)
        return torch.mm(left.to(right.dtype), right, out_dtype=self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.on_cpu:
            return self.product(hidden, self.weight.T)
        shape = len(hidden), len(self.weight)
        if self._tile.shape != shape:
            self._tile = self._tile.new_empty(shape)
        return torch.mm(hidden.to(self.dtype), self.weight.T, out=self._tile)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, without a second tensor of the total's size where the backend can."""
        if self.on_cpu:
            total.addmm_(left, right.to(self.dtype))
        else:
            total += self.product(left, right)


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits by exp(logits - row's largest); returns the largest and the sum of each row, [rows, 1]."""
    peak = logits.amax(dim=1, keepdim=True)
    return peak, logits.sub_(peak).exp_().sum(dim=1, keepdim=True)


def _tiles(hidden: Tensor, targets: Tensor, rows: int):  # type: ignore[no-untyped-def]
    """Yields (slice, hidden tile, target tile), the last one filled up with zeros to the full shape."""
    for start in range(0, len(hidden), rows):
        h, t = hidden[start : start + rows], targets[start : start + rows]
        missing = rows - len(h)
        if missing:
            h, t = nn.functional.pad(h, (0, 0, 0, missing)), nn.functional.pad(t, (0, missing))
        yield slice(start, min(start + rows, len(hidden))), h, t


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = rows
        head = _Weight(weight)
        out = hidden.new_empty(len(hidden), dtype=head.dtype)
        for where, h, t in _tiles(hidden, targets, rows):
            logits = head.logits(h)
            picked = logits.gather(1, t[:, None])
            peak, total = _exp_(logits)
            out[where] = (picked - peak - total.log())[: where.stop - where.start, 0]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        hidden, weight, targets = ctx.saved_tensors
        head = _Weight(weight)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=head.dtype)
        for where, h, t in _tiles(hidden, targets, ctx.rows):
            g = nn.functional.pad(grad[where], (0, len(h) - (where.stop - where.start))).to(head.dtype)
            # d log p(t) / d logits = onehot(t) - softmax
            by_logits = head.logits(h)
            _, total = _exp_(by_logits)
            by_logits.mul_(-g[:, None] / total).scatter_add_(1, t[:, None], g[:, None])
            grad_hidden[where] = head.product(by_logits, head.weight)[: where.stop - where.start].to(hidden.dtype)
            head.add_product(grad_weight, by_logits.T, h)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def token_logprobs(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int64[Tensor, " tokens"],
    rows: int | None = None,
) -> Float[Tensor, " tokens"]:
    """log softmax(hidden @ weight^T)[target] of each row, nats, in fp32 (fp64 for fp64 inputs); differentiable."""
    return _TokenLogProbs.apply(hidden, weight, targets, rows or tile_rows(hidden.device))


class TiledHead(nn.Module):
    """Takes the place of a model's output embedding; a module of its own, so that ZeRO-3 gathers its weight around the
    call.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.weight, targets)
