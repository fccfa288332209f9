"""What a rank does with a version that is written, without an engine: what waits for the weight store, and what does
not.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sampo_ray.actors.ranks import publishing
from sampo_ray.actors.ranks.background import Background
from sampo_ray.actors.ranks.publishing import Publisher
from sampo_ray.run.manifest import Stored
from tests.waiting import scaled


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Background]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    background = Background()
    yield background
    background.close()
    dist.destroy_process_group()


def test_a_store_that_does_not_answer_holds_up_neither_checkpoints_nor_later_versions(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, told = threading.Event(), list[int]()

    def tell(store: object, weights: int, timeout_s: float) -> None:
        told.append(weights)
        assert answers.wait(scaled(60))

    monkeypatch.setattr(publishing, "tell", tell)
    monkeypatch.setattr(Publisher, "_write", lambda *_: False)
    store: Any = None
    publisher = Publisher(store, "host", torch.device("cpu"), background)
    for number in (1, 2, 3):
        version: Any = SimpleNamespace(number=number, new=SimpleNamespace(id=number))
        background.start("version", lambda version=version: publisher._publish(version, store))
    background.start("checkpoint", lambda: background.report(Stored(troubles=("written",))))
    background.wait(scaled(30))
    assert background.collect() == Stored(published=(1, 2, 3), troubles=("written",))
    answers.set()
    publisher.check()
    assert told in ([1, 3], [1, 2, 3], [2, 3], [3]), "the newest always is, older ones if there is time"
