"""What a rank does with a version that is written, without an engine: what waits for the weight store, and what does
not.
"""

import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.exceptions import ActorDiedError

from sampo_ray.actors.ranks import publishing
from sampo_ray.actors.ranks.background import Background
from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.actors.ranks.publishing import Publisher
from sampo_ray.config.run import load_config
from sampo_ray.run import tensor_files
from sampo_ray.run.buckets import unpack
from sampo_ray.run.directory import Run, create_run, open_run
from sampo_ray.run.manifest import StepMetrics, Stored
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import Draft, read_version
from sampo_ray.run.versions import VersionInfo, complete_versions, version_folder
from sampo_ray.training.host_copies import HostBuffer
from sampo_ray.training.snapshots import Snapshot, WeightFile
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


class Weights:
    """A learner of one weight a rank, each in a file of its own, which is the step."""

    def __init__(self) -> None:
        self.weight, self.adapter_names, self.rank = torch.nn.Parameter(torch.zeros(1000)), None, dist.get_rank()

    def weights(self, buffer: HostBuffer) -> Snapshot:
        def file(rank: int) -> WeightFile:
            name = f"w{rank}" if rank else "w"
            return WeightFile(rank, (self.weight,), lambda value: iter([(name, value(self.weight))]))

        world = dist.get_world_size()
        return Snapshot([file(rank) for rank in range(world)], buffer, self.rank, world)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}}
    run = create_run(load_config(tree))
    run.versions.at("000000", "config.json").write(b"{}")
    run.round(0).steps = 9
    run.save()
    return run


class Training:
    """Steps of a rank that publishes each, without waiting unless it is said."""

    def __init__(self, run: Run, background: Background, store: Any = None) -> None:
        self.run, self.background, self.learner = run, background, Weights()
        self.publisher = Publisher(store, "host", torch.device("cpu"), background)
        self.spec = RoundSpec(run.id, run.place, run.config, 0, 0, 9, (), cast(Any, None))

    def step(self, number: int, last: bool = False) -> Stored:
        """Returns what was stored by then of it."""
        with torch.no_grad():
            self.learner.weight.fill_(number)
        self.publisher.publish(self.spec, cast(Any, self.learner), StepMetrics(0, number, number, {}), last)
        self.background.wait(scaled(30))
        wait([self.publisher._told], scaled(30))
        return self.background.collect()

    def read(self, version: int) -> float:
        (bucket,) = read_version(version_folder(self.run.versions.url, version))
        return float(dict(unpack(bucket))["w"][0])


class Full:
    """A disk that has no room for so many writes of weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        monkeypatch.setattr(tensor_files, "pieces", self.pieces(tensor_files.pieces))
        monkeypatch.setattr(publishing, "PAUSE_S", 0.01)

    def pieces(self, made: Any) -> Any:
        def pieces(tensors: Any) -> Iterator[Any]:
            header, *others = made(tensors)
            yield header
            if self.left:
                self.left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            yield from others

        return pieces


def test_on_a_full_disk_a_version_is_tried_again_and_else_left_out_and_the_training_goes_on(
    run: Run, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "tell", lambda *_: None)
    disk, training = Full(monkeypatch), Training(run, background)
    disk.left = 2
    stored = training.step(1)
    assert stored.published == (1,) and training.read(1) == 1.0 and not stored.unwritten
    assert [" could not be written (OSError: [Errno 28] No space left on device)" in each for each in stored.troubles]
    assert stored.troubles[1].endswith("training goes on, and it is tried again (2 of 3 attempts failed)")
    disk.left = 3
    stored = training.step(2)
    assert (stored.published, stored.unwritten, len(stored.troubles)) == ((), (2,), 3)
    assert stored.troubles[2].startswith("publishing version 2 failed: OSError: [Errno 28]")
    assert run.versions.names() == ["000000", "000001"], "nothing is left that would fill the disk"
    assert training.step(3) == Stored(published=(3,)) and training.read(3) == 3.0
    training.publisher.check()
    disk.left = 3
    training.step(9, last=True)
    with pytest.raises(OSError, match="No space left"):
        training.publisher.check()
    assert complete_versions(run.versions.url) == [1, 3]


def test_a_store_that_is_gone_is_said_and_its_version_counts_as_published(
    run: Run, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next store finds it on disk."""
    calls = list[int]()

    def call(run: str, version: int) -> int:
        calls.append(version)
        return version

    def gone(version: int, timeout: float) -> None:
        raise ActorDiedError()

    monkeypatch.setattr("ray.get", gone)
    monkeypatch.setattr("sampo_ray.actors.weights.publish.PAUSE_S", 0.01)
    store = SimpleNamespace(publish=SimpleNamespace(remote=call))
    training = Training(run, background, store)
    for version in (1, 2):
        stored = training.step(version)
        assert (stored.published, stored.unwritten) == ((version,), ())
        (trouble,) = stored.troubles
        assert trouble.startswith(f"version {version} is stored, but the weight store did not take it: ActorDiedError")
    assert calls == [1, 1, 1, 2, 2, 2] and complete_versions(run.versions.url) == [1, 2]
    training.publisher.check()


def test_a_crash_between_snapshot_and_durable_loses_that_version_alone(
    run: Run, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "tell", lambda *_: None)
    dies = Training(run, background)
    dies.step(1)
    disk = Full(monkeypatch)
    with monkeypatch.context() as patch:  # as a process leaves it that dies while it writes
        patch.setattr(Draft, "discard", lambda draft: None)
        disk.left = 3
        assert dies.step(2).published == ()
    assert len(os.listdir(run.versions.path)) == 3 and complete_versions(run.versions.url) == [1]
    again = Training(run, background)
    for number in (1, 2, 3):
        assert again.step(number).published == (number,)
    assert sorted(os.listdir(run.versions.path)) == ["000000", "000001", "000002", "000003"]
    assert [again.read(number) for number in (1, 2, 3)] == [1.0, 2.0, 3.0]


def test_two_ranks_put_their_own_files_of_a_version_into_object_storage_or_none(
    s3: str, tiny_model: Path, tmp_path: Path
) -> None:
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": f"{s3}/run"}}
    run = create_run(load_config(tree))
    run.versions.at("000000", "config.json").write(b"{}")
    base = VersionInfo(version=0, round=0, step=0)
    run.versions.at("000000", "version.json").write(base.model_dump_json().encode())
    run.versions.at("000001", "model-00002-of-00002.safetensors").write(b"of a rank that died")
    mp.spawn(_two_ranks, (run.place.url, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["published"] == [1, 3] and first["unwritten"] == [2] and second["published"] == []
    assert "PeerError: rank 1: OSError: [Errno 28]" in first["troubles"][0], "rank 0 has to try again as well"
    assert run.versions.names() == ["000000", "000001", "000003"]
    for rank, sent in enumerate((first["sent"], second["sent"])):
        assert {name for name in sent if name.endswith(".safetensors")} == {
            f"model-0000{rank + 1}-of-00002.safetensors"
        }
    tensors = {name: each for part in read_version(run.versions.at("000003").url) for name, each in unpack(part)}
    assert {name: float(each[0]) for name, each in tensors.items()} == {"w": 3.0, "w1": 3.0}


def _two_ranks(rank: int, url: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=2)
    background, sent, take, take_file = Background(), set[str](), Place.take, Place.take_file

    def recorded(place: Place, what: Path) -> None:
        sent.update([what.name] if what.is_file() else os.listdir(what))
        (take_file if what.is_file() else take)(place, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "take", recorded)
        patch.setattr(Place, "take_file", recorded)
        patch.setattr(publishing, "tell", lambda *_: None)
        disk, training = Full(patch), Training(open_run(url), background)
        stored = Stored()
        for number, failures in ((1, 1), (2, 3), (3, 0)):
            disk.left = failures if rank else 0
            stored += training.step(number)
    found = {"published": stored.published, "unwritten": stored.unwritten, "troubles": stored.troubles}
    (out / f"{rank}.json").write_text(json.dumps({**found, "sent": sorted(sent)}))
    background.close()
    dist.destroy_process_group()
