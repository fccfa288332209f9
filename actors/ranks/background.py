"""What a training rank does beside its steps: it writes versions and checkpoints in a thread, from copies."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from sampo_ray.errors import described
from sampo_ray.run.manifest import Stored
from sampo_ray.training.learner import from_all_ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")
JOB_S = 3600.0
"""For all jobs of a rank together, when a round waits for them."""


class PeerError(RuntimeError):
    """Another rank could not do its part of what all do together; the message says which and why."""


class Background:
    """One thread a rank for jobs that all ranks start in the same order. Making one is collective.

    What jobs exchange goes over `group`, which nothing else uses: the steps go on meanwhile, in the default group. Its
    operations have a time limit. What jobs `report` is collected for the driver; that one fails is such a report too.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._jobs: queue.Queue[tuple[str, Callable[[], None], Future[None]] | None] = queue.Queue()
        self._running, self._lock, self._stored = list[Future[None]](), threading.Lock(), Stored()
        # A daemon, as a process that ends for an error waits for no other rank.
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()

    def start(self, what: str, job: Callable[[], None]) -> Future[None]:
        """Queues a job, `what` it is for messages. The future tells when it is over, and has its error."""
        over = Future[None]()
        self._running = [each for each in self._running if not each.done()] + [over]
        self._jobs.put((what, job, over))
        return over

    def report(self, stored: Stored) -> None:
        """Adds to what is collected; any thread may."""
        with self._lock:
            self._stored += stored

    def collect(self) -> Stored:
        """What was reported since this was last asked."""
        with self._lock:
            collected, self._stored = self._stored, Stored()
        return collected

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank, by rank; for jobs, all of which must call it. Where it raises on one rank,
        all raise: that one its error, the others PeerError. So no rank waits for one that has given up."""
        value, error = None, None
        try:
            value = work()
        except Exception as failure:  # of any kind, for the others must know
            error = failure
        answers = from_all_ranks((value, error and described(error)), self.group)
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                raise PeerError(f"rank {rank}: {failed}")
        return [cast(T, each) for each, _ in answers]

    def wait(self, timeout_s: float = JOB_S) -> None:
        """Returns once all jobs that were started are over, failed or not; TimeoutError after `timeout_s`."""
        if wait(self._running, timeout_s).not_done:
            raise TimeoutError(f"what is written beside the training was not done within {timeout_s:.0f} s")

    def close(self) -> None:
        """Waits for all jobs, and ends the thread and the group."""
        self._jobs.put(None)
        self._thread.join(JOB_S)
        dist.destroy_process_group(self.group)

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            what, job, over = queued
            try:
                job()
            except Exception as error:  # the training goes on, and the round's end looks at what it needs
                logger.exception("%s failed", what)
                self.report(Stored(troubles=(f"{what} failed: {described(error)}",)))
                over.set_exception(error)
            else:
                over.set_result(None)
            del job, queued  # with the copies that they hold
