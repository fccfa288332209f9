"""Copies of the weights that a rank holds, of which files are made while it trains on.

Each file has one rank that writes it. Where each rank holds all weights (ZeRO-2), it copies what its own files need.
Under ZeRO-3 it copies its part of every weight; the parts of a file go to who writes it afterwards, beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sampo_ray.internals.zero import partition, whole
from sampo_ray.training.host_copies import HostBuffer, as_bytes

Value: TypeAlias = Callable[[Tensor], Tensor]
Named: TypeAlias = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class WeightFile:
    """A file of weights: the `rank` that writes it, the parameters and buffers that it is made of, and what it holds by
    the checkpoint's names, given the value of each of these."""

    rank: int
    parts: tuple[Tensor, ...]
    made: Callable[[Value], Named]


class Snapshot:
    """The weights as they are now, in a buffer that the next one overwrites. Frozen ones are read when they are needed.

    `files` are the same on all ranks. Taking one is not collective. Nothing may write to the weights until they are
    `copied`.
    """

    def __init__(self, files: Sequence[WeightFile], buffer: HostBuffer, rank: int, world: int) -> None:
        self.files, self._rank, self._world = list(files), rank, world
        of_rank = [[index for index, file in enumerate(files) if file.rank == each] for each in range(world)]
        self._waves = list(zip_longest(*of_rank))
        held = [
            part
            for index in (index for wave in self._waves for index in wave if index is not None)
            for part in files[index].parts
            if files[index].rank == rank or partition(part) is not None
        ]
        changing = [part for part in held if part.requires_grad or not isinstance(part, Parameter)]
        ids = list(map(id, changing))
        now = [
            _here(part) if isinstance(part, Parameter) else part.clone() for part in changing
        ]  # passes write to buffers
        self.copied = buffer.copies(now, lambda made: dict(zip(ids, made, strict=True)))

    def own_files(self, group: dist.ProcessGroup | None = None) -> Iterator[tuple[int, Named]]:
        """The files that this rank writes, by their place among all, each with its tensors, which must be taken before
        the next is asked for. Collective in `group` under ZeRO-3, to the end: on ranks that write fewer, too."""
        for wave in self._waves:
            wholes = self._exchanged(wave, group)
            index = wave[self._rank]
            if index is not None:
                yield index, self.files[index].made(partial(self._value, wholes))

    def _exchanged(self, wave: Sequence[int | None], group: dist.ProcessGroup | None) -> dict[int, Tensor]:
        """The whole values of the parameters of this rank's file of the wave that are in parts, by their ids."""
        split = [
            [] if index is None else [part for part in self.files[index].parts if partition(part) is not None]
            for index in wave
        ]
        if self._world == 1 or not any(split):
            return {id(part): whole(part, self._copy(part)) for part in split[self._rank]}
        sent = [[as_bytes(self._copy(part)) for part in parts] for parts in split]
        sizes, mine = [sum(map(len, each)) for each in sent], [len(each) for each in sent[self._rank]]
        ours = torch.cat([each for parts in sent for each in parts])
        theirs = torch.empty(self._world * sum(mine), dtype=torch.uint8)
        dist.all_to_all_single(theirs, ours, [sum(mine)] * self._world, sizes, group=group)
        by_rank = theirs.view(self._world, -1).split(mine, dim=1) if mine else ()
        return {  # a file of one parameter, which may be the largest there is, is not copied again
            id(part): whole(part, parts.contiguous().view(-1).view(part.dtype))
            for part, parts in zip(split[self._rank], by_rank, strict=True)
        }

    def _value(self, wholes: dict[int, Tensor], part: Tensor) -> Tensor:
        return wholes[id(part)] if id(part) in wholes else self._copy(part)

    def _copy(self, part: Tensor) -> Tensor:
        copies = self.copied.result()
        return copies[id(part)] if id(part) in copies else _here(part).cpu()


def _here(part: Tensor) -> Tensor:
    """What this rank holds of a parameter or buffer."""
    own = partition(part)
    return (part if own is None else own).detach()
