"""The pairs of a round's later epochs as parts in their order, made while the epoch before trains."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.loop.blocks import StageOutput
from sampo_ray.loop.reorder import reorder
from sampo_ray.training.batching import epoch_order


class LaterEpochs:
    """Makes the later epochs of a round that is trained in the block, one after another in a thread, and removes them.

    There are those from the epoch on in which the ranks would begin again, to the one after that which they train. With
    two checkpoints an epoch that is three at most, each of which takes as much as the round's pairs do. What is there
    already stays. Nothing is made of a round whose pairs the ranks hold.
    """

    def __init__(self, spec: RoundSpec) -> None:
        self._spec, self._epochs = spec, spec.config.rounds.epochs if spec.in_order else 1
        self._steps = spec.steps // spec.config.rounds.epochs  # of one epoch
        self._first, self._next = 1, 1  # those that are there, or are going to be
        self._over, self._worker = threading.Event(), ThreadPoolExecutor(1, "later-epochs")
        self._work = list[Future[None]]()

    def __enter__(self) -> "LaterEpochs":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._worker.shutdown(cancel_futures=True)

    def resume(self, done: int, oldest: int) -> None:
        """The ranks begin after step `done`, or, if its checkpoint is damaged, after step `oldest`."""
        self._keep(oldest // self._steps, done // self._steps)

    def reached(self, step: int, oldest: int) -> None:
        """A step is trained; if ranks fail, they go back to step `oldest` at most."""
        self._keep(oldest // self._steps, (step - 1) // self._steps + 1)

    def check(self) -> None:
        """Raises StageError if an epoch could not be made."""
        for work in [work for work in self._work if work.done()]:
            work.result()
            self._work.remove(work)

    def _keep(self, first: int, last: int) -> None:
        """Has there be the epochs from `first` to `last`."""
        last = min(last, self._epochs - 1)
        for epoch in range(self._first, min(first, self._epochs)):
            self._work.append(self._worker.submit(self._spec.epochs.at(str(epoch)).remove))
        self._first = max(self._first, first)
        for epoch in range(max(self._next, self._first), last + 1):
            self._work.append(self._worker.submit(self._make, epoch))
        self._next = max(self._next, last + 1)

    def _make(self, epoch: int) -> None:
        spec, stored = self._spec, self._spec.stored
        pairs, seed = sum(part.rows for part in stored), spec.config.run.seed
        order = epoch_order(pairs, seed=seed, round=spec.round, epoch=epoch)
        out = StageOutput(spec.epochs.at(str(epoch)), enough=self._over.is_set)
        reorder(stored, order, out, stored[0].rows)
