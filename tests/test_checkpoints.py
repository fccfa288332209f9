"""Checkpoints beside the steps, and restored; the learner is a few numbers, DeepSpeed's is in test_learner."""

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sampo_ray.actors.ranks.background import Background
from sampo_ray.actors.ranks.checkpoints import Checkpointer, restore
from sampo_ray.config.run import load_config
from sampo_ray.errors import TrainingError
from sampo_ray.loop.rounds import Round
from sampo_ray.run import durable
from sampo_ray.run.checksums import checksum_of_file
from sampo_ray.run.directory import Run, create_run
from sampo_ray.run.manifest import Checkpoint, Manifest, RoundRecord, StepMetrics, StepResult, Stored
from sampo_ray.run.storage import Place
from sampo_ray.training.host_copies import HostBuffer, with_copies
from sampo_ray.training.statistics import Statistics
from tests.waiting import scaled


class Counter:
    """A learner whose state is the number of its steps."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.step, self.round, self.statistics = rank, world, 0, 0, Statistics()
        self.state = torch.zeros(1000)
        self.files = ["model.pt", f"optimizer-{rank}.pt"]
        self.loaded: tuple[Path, bool] | None = None
        self.copied: Future[dict[str, object]] | None = None

    def optimize(self) -> None:
        if self.copied:
            self.copied.result()
        self.step += 1
        self.state += 1

    def snapshot(self, buffer: HostBuffer) -> Future[dict[str, object]]:
        states: dict[str, object] = {f"optimizer-{self.rank}.pt": {"state": self.state}}
        if not self.rank:
            states["model.pt"] = {"step": self.step}
        self.copied = with_copies(states, buffer)
        return self.copied

    def warm(self, buffer: HostBuffer) -> None:
        self.snapshot(buffer)

    def load(self, folder: Path, tag: str, round: int, step: int, *_: object, universal: bool = False) -> None:
        state = torch.load(folder / tag / self.files[1])["state"]
        self.state, self.round, self.step, self.loaded = state, round, step, (folder / tag, universal)


def spec_of(place: Place, every: int = 2) -> Any:
    trainer = SimpleNamespace(checkpoint_every=every)
    config = SimpleNamespace(trainer=trainer, model=SimpleNamespace(lora=None))
    return SimpleNamespace(place=place, round=0, config=config)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Background]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    background = Background()
    yield background
    background.close()
    dist.destroy_process_group()


def named(place: Place, *stored: Checkpoint) -> None:
    """The manifest of a run with these checkpoints, the newest first."""
    newest, *earlier = stored
    rounds = [RoundRecord(index=0, start_version=0, steps=8)]
    manifest = Manifest(id="r", rounds=rounds, checkpoint=newest, earlier=next(iter(earlier), None))
    place.at("manifest.json").write(manifest.model_dump_json().encode())


def trained(spec: Any, learner: Any, background: Background, steps: int) -> list[Checkpoint]:
    """Steps, each of which waits for its checkpoint."""
    checkpointer = Checkpointer(background, learner)
    for _ in range(steps):
        learner.optimize()
        checkpointer.after_step(spec, learner, last=False)
        background.wait(scaled(30))
    return list(background.collect().checkpoints)


def test_what_is_written_is_the_state_of_its_step_however_the_training_goes_on(
    alone: Background, tmp_path: Path
) -> None:
    place, learner, gate = Place(str(tmp_path / "run")), Counter(), threading.Event()
    checkpointer, spec = Checkpointer(alone, learner), spec_of(place)
    alone.start("slow", lambda: gate.wait(scaled(30)) and None)
    for _ in range(3):
        learner.optimize()
        checkpointer.after_step(spec, learner, last=False)
    assert alone.collect() == Stored() and not place.at("checkpoints", "0-000002").exists()
    gate.set()
    alone.wait(scaled(30))
    (stored,) = alone.collect().checkpoints
    assert (stored.path, stored.step, stored.world) == ("checkpoints/0-000002", 2, 1)
    folder = tmp_path / "run" / stored.path
    assert stored.files == {path.name: checksum_of_file(path) for path in folder.iterdir()}
    assert torch.equal(torch.load(folder / "optimizer-0.pt")["state"], torch.full((1000,), 2.0))
    assert [path.name for path in folder.parent.iterdir()] == ["0-000002"]


def test_one_that_is_due_while_another_is_written_is_of_the_first_step_after_that(
    alone: Background, tmp_path: Path
) -> None:
    learner, gate = Counter(), threading.Event()
    checkpointer, spec = Checkpointer(alone, learner), spec_of(Place(str(tmp_path)))
    alone.start("slow", lambda: gate.wait(scaled(30)) and None)
    for step in range(1, 8):
        if step == 7:
            gate.set()
            alone.wait(scaled(30))
        learner.optimize()
        checkpointer.after_step(spec, learner, last=False)
    learner.optimize()
    checkpointer.after_step(spec, learner, last=True)
    alone.wait(scaled(30))
    checkpointer.check()
    assert [each.step for each in alone.collect().checkpoints] == [2, 7, 8]


def test_a_full_disk_is_told_and_leaves_nothing_and_only_a_rounds_end_needs_its_checkpoint(
    alone: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, place, write = Counter(), Place(str(tmp_path / "run")), durable.HashedFile.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer, spec = Checkpointer(alone, learner), spec_of(place)
    for step in range(1, 6):
        monkeypatch.setattr(durable.HashedFile, "write", write if step == 4 else full)
        learner.optimize()
        checkpointer.after_step(spec, learner, last=step == 5)
        alone.wait(scaled(30))
    with pytest.raises(OSError, match="No space left"):
        checkpointer.check()
    found = alone.collect()
    assert [each.step for each in found.checkpoints] == [4]
    assert ["No space left" in each for each in found.troubles] == [True, True]
    assert found.troubles[0].startswith("writing checkpoints/0-000002 failed: OSError")
    assert place.at("checkpoints").names() == ["0-000004"]


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(alone: Background, tmp_path: Path, harm: str) -> None:
    spec, learner = spec_of(Place(str(tmp_path))), Counter()
    earlier, newest = trained(spec, learner, alone, 4)
    named(spec.place, newest, earlier)
    (left := tmp_path / "checkpoints" / ".draft-x").mkdir()
    again = Counter()
    restore(spec, again)
    assert again.step == 4 and torch.equal(again.state, learner.state) and not left.exists()
    file = tmp_path / newest.path / "optimizer-0.pt"
    file.write_bytes(file.read_bytes()[:-1]) if harm == "changed" else file.unlink()
    restore(spec, again := Counter())
    assert again.step == 2 and again.state[0] == 2
    (tmp_path / earlier.path / "model.pt").unlink()
    with pytest.raises(TrainingError, match="is damaged .*no other checkpoint"):
        restore(spec, Counter())


def test_a_checkpoint_of_another_stage_is_refused(alone: Background, tmp_path: Path) -> None:
    spec = spec_of(Place(str(tmp_path)))
    named(spec.place, *trained(spec, Counter(), alone, 2))
    other = Counter()
    other.files = ["shard-0.pt", "optimizer-0.pt"]
    with pytest.raises(TrainingError, match=r"another trainer.zero_stage \(it has no shard-0.pt\)"):
        restore(spec, other)


def test_two_ranks_write_and_fetch_their_own_files_and_one_without_room_undoes_both(s3: str, tmp_path: Path) -> None:
    mp.spawn(_two_ranks, (f"{s3}/run", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["troubles"] == ("writing checkpoints/0-000004 failed: PeerError: rank 1: OSError: [Errno 28] full",)
    assert first["there"] == ["0-000002"]
    assert (first["fetched"], second["fetched"]) == (["model.pt", "optimizer-0.pt"], ["optimizer-1.pt"])
    assert first["folder"] == second["folder"] and not Path(first["folder"]).exists()
    assert (first["state"], second["state"]) == (2.0, 12.0)


def _two_ranks(rank: int, url: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=2)
    background, spec, learner, write = Background(), spec_of(Place(url)), Counter(rank, 2), durable.save
    learner.state += 10 * rank
    stored = trained(spec, learner, background, 2)
    if rank:

        def full(*_: object) -> str:
            raise OSError(errno.ENOSPC, "full")

        durable.save = full
    checkpointer = Checkpointer(background, learner)
    learner.step = 3
    learner.optimize()
    checkpointer.after_step(spec, learner, last=False)
    background.wait(scaled(30))
    troubles, there = background.collect().troubles, spec.place.at("checkpoints").names()
    durable.save = write
    if not rank:
        named(spec.place, *stored)
    dist.barrier()
    fetched, download = list[str](), Place.download

    def recorded(place: Place, target: Path, names: list[str]) -> None:
        fetched.extend(names)
        download(place, target, names)

    Place.download = recorded
    restore(spec, again := Counter(rank, 2))
    assert again.loaded is not None
    values = {"state": float(again.state[0]), "folder": str(again.loaded[0]), "fetched": fetched}
    torch.save({**values, "troubles": troubles, "there": there}, out / f"{rank}.pt")
    dist.barrier()
    background.close()
    dist.destroy_process_group()


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}}
    run = create_run(load_config(tree))
    run.round(0).steps = 8
    return run


def test_the_manifest_keeps_two_checkpoints_and_what_is_being_written(run: Run) -> None:
    folder, round = run.place.at("checkpoints"), Round(run, 0, MagicMock())

    def take(step: int) -> list[str]:
        path = f"checkpoints/0-{step:06d}"
        run.place.at(path, "file").write(b"")
        done = Checkpoint(path=path, round=0, step=step, world=1, files={})
        round.record(StepResult(StepMetrics(0, step, step, {}), Stored(checkpoints=(done,))))
        return folder.names()

    assert take(2) == ["0-000002"]
    folder.at("0-000003", "file").write(b"of ranks that died")
    folder.at("0-000007", "file").write(b"begun")
    folder.at("0-000002-universal", "file").write(b"of an earlier build")
    assert take(4) == ["0-000002", "0-000004", "0-000007"]
    assert take(6) == ["0-000004", "0-000006", "0-000007"]
    assert take(5) == ["0-000004", "0-000005", "0-000006", "0-000007"]  # ranks went back before a damaged one
    assert run.manifest.checkpoint and run.manifest.earlier
    assert (run.manifest.checkpoint.step, run.manifest.earlier.step) == (5, 4)
    assert take(7) == ["0-000005", "0-000007"]
