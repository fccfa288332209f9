"""Checkpoints of the learners: how ranks write them beside their steps, find, check and load them, by as many ranks as
there are.
"""

import contextlib
import logging
import platform
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from sampo_ray.actors.ranks.background import JOB_S, Background
from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.errors import TrainingError
from sampo_ray.run import durable
from sampo_ray.run.checksums import checksum_of_file
from sampo_ray.run.manifest import Checkpoint, Stored, read_manifest
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.storage import Place
from sampo_ray.training.host_copies import HostBuffer
from sampo_ray.training.learner import Learner, from_all_ranks

logger = logging.getLogger(__name__)


class Checkpointer:
    """Copies a learner's states where a checkpoint is due, beside the passes of the next step, and writes the copies
    beside the steps after, each rank its own. A checkpoint is complete once the manifest names it, with the checksums
    that are reported in the end.

    There are copies of one checkpoint at a time. One that is due while the one before is still being written waits for
    that, and so is of a later step: the steps go on, and what a crash loses is never more than it must be.
    """

    def __init__(self, background: Background, learner: Learner) -> None:
        self._background, self._buffer = background, HostBuffer()
        self._due, self._written = False, _done()
        learner.warm(self._buffer)

    def after_step(self, spec: RoundSpec, learner: Learner, last: bool) -> None:
        """Begins a checkpoint if one is due, as it is after a round's `last` step; collective where that is so."""
        self._due |= last or learner.step % spec.config.trainer.checkpoint_every == 0
        if not self._due:
            return
        if last:
            wait([self._written], JOB_S)
        if not all(from_all_ranks(self._written.done())):
            return
        self._due, self._written = False, self._write(spec, learner)

    def check(self) -> None:
        """Raises the error if the last checkpoint could not be written; TimeoutError if it still is."""
        self._written.result(timeout=0)

    def _write(self, spec: RoundSpec, learner: Learner) -> Future[None]:
        path = f"checkpoints/{spec.round}-{learner.step:06d}"
        target, background, first = spec.place.at(path), self._background, not learner.rank
        step, world, statistics = learner.step, learner.world, learner.statistics
        complete = partial(Checkpoint, path=path, round=spec.round, step=step, world=world, statistics=statistics)
        states = learner.snapshot(self._buffer)

        def write() -> None:
            background.together(lambda: target.remove() if first else None)  # one that was not completed
            try:
                written = background.together(lambda: write_states(states.result(), target))
            except Exception:
                if first:
                    target.remove()  # what others wrote of it
                raise
            if first:
                files = {name: sum for each in written for name, sum in each.items()}
                background.report(Stored(checkpoints=(complete(files=files),)))

        return background.start(f"writing {path}", write)


def _done() -> Future[None]:
    future = Future[None]()
    future.set_result(None)
    return future


def write_states(states: dict[str, object], target: Place) -> dict[str, str]:
    """Writes a rank's files of a checkpoint into its folder, and returns their checksums by name."""
    with target.draft() as scratch:
        sums = {name: durable.save(state, scratch / name) for name, state in states.items()}
        target.take(scratch)
    return sums


def restore(spec: RoundSpec, learner: Learner) -> None:
    """Loads the newest checkpoint or, if that is damaged, the one before."""
    if not learner.rank:
        spec.place.at("checkpoints").clear_drafts()  # of ranks that died while writing
    damaged = list[str]()
    for checkpoint in from_all_ranks([] if learner.rank else _checkpoints(spec))[0]:
        if spec.config.model.lora and checkpoint.round != spec.round:
            return
        with _fetched(checkpoint, spec.place, learner) as (folder, found):
            if not found:
                if damaged and not learner.rank:
                    logger.warning("%s is damaged; training continues from %s", damaged[0], checkpoint.path)
                _load(checkpoint, folder, spec.place.at(checkpoint.path), learner)
                return
            damaged += found
    if damaged:
        raise TrainingError(
            f"{damaged[0]} is damaged (its checksum does not match), and there is no other checkpoint to go on from"
        )


def _checkpoints(spec: RoundSpec) -> list[Checkpoint]:
    """Checkpoints from which the round can continue or begin, the newest first."""
    manifest = read_manifest(spec.place)

    def fits(checkpoint: Checkpoint) -> bool:
        ends = checkpoint.step == manifest.rounds[checkpoint.round].steps
        return checkpoint.round == spec.round or (ends and checkpoint.round == spec.round - 1)

    return [each for each in (manifest.checkpoint, manifest.earlier) if each and fits(each)]


@contextlib.contextmanager
def _fetched(checkpoint: Checkpoint, run: Place, learner: Learner) -> Iterator[tuple[Path, list[str]]]:
    """The folder with the files of a checkpoint that the ranks here need, and those of all ranks that are damaged or
    missing; collective. Each file is fetched, where it is remote, and checked by one rank of those that share it."""
    place = run.at(checkpoint.path)
    here = ranks_here(place, learner)
    with _scratch(place, here, learner) as folder:
        names = _share(checkpoint, here, learner)
        if not place.local:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    place.download(folder, [name])
        bad = [
            f"{checkpoint.path}/{name}"
            for name in names
            if not (folder / name).is_file() or checksum_of_file(folder / name) != checkpoint.files[name]
        ]
        yield folder, [name for some in from_all_ranks(bad) for name in some]


def ranks_here(place: Place, learner: Learner) -> list[int]:
    """The ranks that see the same local copy of a place as this one: all, or those of its machine; collective."""
    machines = from_all_ranks("" if place.local else platform.node())
    return [rank for rank, machine in enumerate(machines) if machine == machines[learner.rank]]


@contextlib.contextmanager
def _scratch(place: Place, here: list[int], learner: Learner) -> Iterator[Path]:
    """The place's folder or, if that is remote, one for its copy that the first rank here makes, and removes when all
    have left; collective."""
    with contextlib.ExitStack() as stack:
        folder = Path(place.path) if place.local else None
        if folder is None and learner.rank == here[0]:
            folder = stack.enter_context(scratch_folder()) / place.name
        shared = from_all_ranks(folder)[here[0]]
        assert shared is not None
        yield shared
        from_all_ranks(None)


def _share(checkpoint: Checkpoint, here: list[int], learner: Learner) -> list[str]:
    """Names of the files that this rank fetches and checks: those that it loads and no rank here before it does or,
    where they are to be converted, its share of all. TrainingError if there is no such file."""
    if checkpoint.world != learner.world:
        return sorted(checkpoint.files)[here.index(learner.rank) :: len(here)]
    loaded = from_all_ranks(learner.files)
    if unknown := [name for name in loaded[learner.rank] if name not in checkpoint.files]:
        raise TrainingError(
            f"{checkpoint.path} was written with another trainer.zero_stage (it has no {unknown[0]}); resume with the "
            "one that it was written with"
        )
    before = {name for rank in here if rank < learner.rank for name in loaded[rank]}
    return [name for name in loaded[learner.rank] if name not in before]


def _load(checkpoint: Checkpoint, folder: Path, place: Place, learner: Learner) -> None:
    """Loads a checkpoint from its folder; one of another number of ranks is converted first, once for those that share
    the folder; collective."""
    position = checkpoint.round, checkpoint.step, checkpoint.statistics
    if checkpoint.world == learner.world:
        learner.load(folder.parent, folder.name, *position)
        return
    here = ranks_here(place, learner)
    with contextlib.ExitStack() as stack:
        converted = None
        if learner.rank == here[0]:
            from sampo_ray.internals.deepspeed import write_universal

            logger.info("converting %s from %d to %d ranks", checkpoint.path, checkpoint.world, learner.world)
            converted = stack.enter_context(place.draft()) / "universal"
            write_universal(folder, converted)
        shared = from_all_ranks(converted)[here[0]]
        assert shared is not None
        learner.load(shared.parent, shared.name, *position, universal=True)
        from_all_ranks(None)
