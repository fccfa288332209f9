"""Stages whose calls run in this process, for tests of what they make; failing calls are for tests on real Ray."""

import os
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sampo_ray.loop import blocks, evaluating, reorder, stages
from sampo_ray.loop.blocks import StageOutput, Start
from sampo_ray.run.parts import part_place


class InProcess:
    """In place of `blocks.Work`: each call is done when it is started."""

    def __init__(self, out: StageOutput, window: int, missing: Iterable[int], start: Start, result: Any) -> None:
        self._out, self._missing, self._start = out, missing, start

    @classmethod
    def __class_getitem__(cls, result: Any) -> "type[InProcess]":
        return cls

    def completed(self) -> Iterator[tuple[int, None, Any]]:
        for index in self._missing:
            if self._out.enough():
                return
            yield index, None, self._start(index, part_place(self._out.folder, index), False)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray: what only looks at parts, or puts them in another order, runs here, on files that are not synced."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for module in (blocks, reorder):
        monkeypatch.setattr(module, "Work", InProcess)
    for module in (evaluating, stages, reorder):
        monkeypatch.setattr(module, "tasks_at_once", lambda: 1)
    for module, task in ((blocks, "_of_each"), (reorder, "_join"), (reorder, "_write_pieces")):
        monkeypatch.setattr(module, task, SimpleNamespace(remote=getattr(module, task)._function))
