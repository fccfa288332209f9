"""Jobs beside the training, alone and on two gloo ranks."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sampo_ray.actors.ranks.background import Background, PeerError
from sampo_ray.run.manifest import Stored
from tests.waiting import scaled


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Background]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    background = Background()
    yield background
    background.close()
    dist.destroy_process_group()


def test_jobs_run_beside_their_starter_one_after_the_other(background: Background) -> None:
    gate, done = threading.Event(), list[str]()

    def slow() -> None:
        assert gate.wait(scaled(30))
        done.append("slow")
        background.report(Stored(published=(4,)))

    first = background.start("slow", slow)
    second = background.start("fast", lambda: done.append("fast"))
    assert not first.done() and not second.done() and background.collect() == Stored()
    with pytest.raises(TimeoutError, match="not done within 0 s"):
        background.wait(0.01)
    gate.set()
    background.wait(scaled(30))
    assert done == ["slow", "fast"] and first.done() and second.done()
    assert background.collect() == Stored(published=(4,)) and background.collect() == Stored()


def test_a_job_that_fails_is_a_report_and_the_next_one_runs(background: Background) -> None:
    def fail() -> None:
        background.report(Stored(published=(1,)))
        raise OSError("disk full")

    failed = background.start("version 2", fail)
    other = background.start("other", lambda: background.report(Stored(published=(3,))))
    background.wait(scaled(30))
    assert background.collect() == Stored((1, 3), troubles=("version 2 failed: OSError: disk full",))
    assert isinstance(failed.exception(), OSError) and other.exception() is None


def test_what_a_job_holds_is_freed_when_it_is_over(background: Background) -> None:
    freed = threading.Event()

    class Large:
        def write(self) -> None:
            pass

        def __del__(self) -> None:
            freed.set()

    background.start("large", Large().write)
    assert freed.wait(scaled(30))


def test_alone_what_is_done_together_is_done(background: Background) -> None:
    answers = list[list[int]]()
    background.start("work", lambda: answers.append(background.together(lambda: 7)))
    background.wait(scaled(30))
    assert answers == [[7]]


def test_two_ranks_do_their_jobs_together_or_not_at_all(tmp_path: Path) -> None:
    mp.spawn(_two_ranks, (tmp_path,), nprocs=2)


def _two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    background, answers = Background(), list[list[str]]()

    def job(fails: bool) -> None:
        def work() -> str:
            time.sleep(0.05 * rank)
            if fails and rank:
                raise OSError("disk full")
            return f"rank {rank}"

        answers.append(background.together(work))

    jobs = [background.start(f"job {fails}", lambda fails=fails: job(fails)) for fails in (False, True, False)]
    for _ in range(100):  # the default group goes on meanwhile
        dist.all_reduce(torch.ones(10))
    background.wait(scaled(60))
    assert answers == [["rank 0", "rank 1"]] * 2, "jobs after one that failed are not disturbed"
    error = jobs[1].exception()
    assert isinstance(error, OSError if rank else PeerError) and "disk full" in str(error)
    assert "rank 1" in str(error) or rank
    background.close()
    dist.destroy_process_group()
