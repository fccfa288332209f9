"""Checkpoints of the learners: how ranks write, find, check and load them, by as many ranks as there are."""

import logging
from pathlib import Path

import torch.distributed as dist

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.errors import TrainingError
from sampo_ray.run.buckets import checksum_of_file, checksums
from sampo_ray.run.manifest import Checkpoint, read_manifest
from sampo_ray.run.storage import Place
from sampo_ray.training.learner import Learner, from_all_ranks

logger = logging.getLogger(__name__)


def write_checkpoint(spec: RoundSpec, learner: Learner) -> Checkpoint:
    """Writes the learner's state; complete once the manifest names it with its checksums."""
    path = f"checkpoints/{spec.round}-{learner.step:06d}"
    target = spec.place.at(path)
    if not learner.rank:
        target.remove()
    dist.barrier()
    with target.draft() as scratch:
        learner.save(scratch, "state")
        sums = checksums(scratch / "state")
        target.take(scratch / "state")
    files = {name: sum for files in from_all_ranks(sums) for name, sum in files.items()}
    step, world, statistics = learner.step, learner.world, learner.statistics
    return Checkpoint(path=path, round=spec.round, step=step, world=world, files=files, statistics=statistics)


def restore(spec: RoundSpec, learner: Learner) -> None:
    """Loads the newest checkpoint or, if that is damaged, the one before."""
    if not learner.rank:
        spec.place.at("checkpoints").clear_drafts()  # of ranks that died while writing
    found = [[] if learner.rank else _checkpoints(spec)]
    dist.broadcast_object_list(found)
    damaged = list[str]()
    for checkpoint in found[0]:
        if spec.config.model.lora and checkpoint.round != spec.round:
            return
        with spec.place.at(checkpoint.path).on_disk() as folder:
            if not (files := _damaged(folder, checkpoint, learner)):
                if damaged and not learner.rank:
                    logger.warning("%s is damaged; training continues from %s", damaged[0], checkpoint.path)
                _load(checkpoint, folder, spec.place, learner)
                return
            damaged += files
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


def _damaged(folder: Path, checkpoint: Checkpoint, learner: Learner) -> list[str]:
    """Files that differ from what was written; each rank checks some, and returns those of all."""
    mine = [
        f"{checkpoint.path}/{name}"
        for name in sorted(checkpoint.files)[learner.rank :: learner.world]
        if not (folder / name).is_file() or checksum_of_file(folder / name) != checkpoint.files[name]
    ]
    return [name for some in from_all_ranks(mine) for name in some]


def _load(checkpoint: Checkpoint, folder: Path, place: Place, learner: Learner) -> None:
    """Loads a checkpoint from its folder; one of another number of ranks is converted first."""
    position = checkpoint.round, checkpoint.step, checkpoint.statistics
    universal = place.at(f"{checkpoint.path}-universal")
    if not learner.rank:
        universal.remove()  # of ranks that died while writing
    if checkpoint.world == learner.world:
        learner.load(folder.parent, folder.name, *position)
        return
    if not learner.rank:
        logger.info("converting %s from %d to %d ranks", checkpoint.path, checkpoint.world, learner.world)
        with universal.draft() as scratch:
            from sampo_ray.internals.deepspeed import write_universal

            write_universal(folder, scratch / "state")
            universal.take(scratch / "state")
    dist.barrier()
    with universal.on_disk() as merged:
        learner.load(merged.parent, merged.name, *position, universal=True)
    dist.barrier()
    if not learner.rank:
        universal.remove()
