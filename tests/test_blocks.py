"""Parts of stages whose calls fail, on real Ray: what is made again, when and from what, and what ends the stage."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray import exceptions
from ray.serve.exceptions import BackPressureError

from sampo_ray.errors import StageError, WeightsNotLoadedError
from sampo_ray.loop import blocks, stages
from sampo_ray.loop.blocks import ATTEMPTS, NotTakenError, StageOutput, of_each, run_stage
from sampo_ray.loop.reorder import reorder
from sampo_ray.run.parts import Part, part_place
from sampo_ray.run.storage import Place
from tests.waiting import scaled

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
TABLE = pa.table({"n": [1, 2, 3]})
KILLED = exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")


@ray.remote(num_cpus=0.1)
def make(place: Place, error: Exception | None = None) -> pa.Table:
    if error is not None:
        raise error
    place.write_table(TABLE)
    return TABLE


class Failing:
    """Starts calls of which the first so many fail; keeps when they were started, and whether again."""

    def __init__(self, error: Exception, times: int) -> None:
        self._error, self._times = error, times
        self.started: list[tuple[float, bool]] = []

    def __call__(self, index: int, place: Place, again: bool) -> ray.ObjectRef:
        self.started.append((time.monotonic(), again))
        failing = len(self.started) <= self._times
        if failing and isinstance(self._error, NotTakenError):
            raise self._error
        return make.remote(place, self._error if failing else None)


@pytest.fixture
def out(tmp_path: Path) -> StageOutput:
    return StageOutput(Place(str(tmp_path / "stage")))


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PAUSE_S", 0.01)


@pytest.mark.parametrize(
    "error",
    [
        KILLED,
        exceptions.ActorDiedError(),
        exceptions.ActorUnavailableError("it restarts", None),
        exceptions.WorkerCrashedError(),
        exceptions.ObjectLostError("00", None, ""),
        exceptions.NodeDiedError("gone"),
        exceptions.LocalRayletDiedError(),
        WeightsNotLoadedError("version 3 has passed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_part_whose_process_was_lost_is_made_again(error: Exception, out: StageOutput, short_pauses: None) -> None:
    start = Failing(error, times=1)
    (part,) = run_stage(out, 1, 1, start)
    assert part.table().equals(TABLE)
    assert [again for _, again in start.started] == [False, True]


def test_there_is_a_growing_pause_before_each_attempt(out: StageOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PAUSE_S", 0.05)
    start = Failing(exceptions.ActorUnavailableError("it restarts", None), times=ATTEMPTS - 1)
    run_stage(out, 1, 1, start)
    times = [when for when, _ in start.started]
    pauses = [later - before for before, later in itertools.pairwise(times)]
    assert all(pause >= 0.05 * 4**n for n, pause in enumerate(pauses)) and len(pauses) == ATTEMPTS - 1


def test_too_little_memory_is_named_with_what_to_lower(out: StageOutput, short_pauses: None) -> None:
    start = Failing(KILLED, times=ATTEMPTS)
    with pytest.raises(StageError, match=r"out of memory \(Task was killed.*lower fleet\.\*\.max_replicas"):
        run_stage(out, 1, 1, start)
    assert len(start.started) == ATTEMPTS


def test_a_call_that_failed_by_itself_ends_the_stage_at_once(out: StageOutput) -> None:
    start = Failing(ValueError("the reward makes no sense"), times=1)
    with pytest.raises(StageError, match="^the reward makes no sense$"):
        run_stage(out, 1, 1, start)
    assert len(start.started) == 1


def test_a_full_queue_is_waited_for_and_is_no_failed_attempt(out: StageOutput, short_pauses: None) -> None:
    start = Failing(NotTakenError("queue full"), times=2 * ATTEMPTS)
    assert len(run_stage(out, 1, 2, start)) == 2
    assert not any(again for _, again in start.started)


def test_a_stage_that_only_waits_ends_too(out: StageOutput, short_pauses: None, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "STAGE_STALL_S", 0.3)
    with pytest.raises(StageError, match="nothing was completed"):
        run_stage(out, 1, 1, Failing(NotTakenError("queue full"), times=10**9))


def test_serve_says_that_a_queue_is_full_with_an_error_that_is_told_from_others(monkeypatch) -> None:
    def refused(error: Exception) -> Callable[..., ray.ObjectRef]:
        return lambda *_: (_ for _ in ()).throw(error)

    for error, raised in ((BackPressureError(9, 8), NotTakenError), (TimeoutError(), StageError)):
        monkeypatch.setattr("sampo_ray.internals.serve.result_ref", refused(error))
        with pytest.raises(raised):
            stages.as_ref(None)  # type: ignore[arg-type]


class Restarting:
    """Dies in its first call, and takes a while to come back."""

    def __init__(self, folder: str) -> None:
        self._dies = Path(folder) / "dies"
        if self._dies.exists():
            time.sleep(1.5)

    def make(self, place: Place) -> pa.Table:
        if not self._dies.exists():
            self._dies.touch()
            os._exit(1)
        place.write_table(TABLE)
        return TABLE


def test_an_actor_that_restarts_is_asked_again_once_it_is_back(out: StageOutput, tmp_path: Path) -> None:
    actor = ray.remote(Restarting).options(num_cpus=0.1, max_restarts=-1).remote(str(tmp_path))
    (part,) = run_stage(out, 1, 1, lambda index, place, again: actor.make.remote(place))
    assert part.table().equals(TABLE)


class Owner:
    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(TABLE)]


def test_parts_whose_objects_were_lost_are_read_from_their_files(
    out: StageOutput, tmp_path: Path, short_pauses
) -> None:
    owner = ray.remote(Owner).options(num_cpus=0.1).remote()
    (ref,) = ray.get(owner.put.remote(), timeout=scaled(60))
    place = part_place(Place(str(tmp_path)), 0)
    place.write_table(TABLE)
    ray.kill(owner)
    time.sleep(1.0)
    lost = Part(place, 3, ref)
    (reordered,) = reorder([lost], np.array([2, 0]), out, 8)
    assert reordered.table()["n"].to_pylist() == [3, 1]
    assert of_each([lost, lost], 1, len) == [3, 3]
