"""How the next online round is prepared while one trains."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sampo_ray.errors import StageError
from sampo_ray.loop import stages
from sampo_ray.loop.blocks import STAGE_STALL_S, StageOutput
from sampo_ray.loop.reorder import reorder
from sampo_ray.loop.rounds import Round, prompts_of, sample
from sampo_ray.run.parts import Part

if TYPE_CHECKING:
    from sampo_ray.loop.fleet import Fleet

CHECK_EVERY_S = 0.5


@contextlib.contextmanager
def prepare_next_round(round: Round, fleet: "Fleet", prompts: Sequence[Part]) -> Iterator[None]:
    """Prepares the next online round in a thread, for as long as the block runs.

    With `rollout.ahead` its completions are sampled from whatever weights the replicas have, so they are older than the
    next round's start by at most this round's steps; the next round samples the rest. Otherwise generators that were
    scaled down are started in time for it.
    """
    if not round.config.online or round.index + 1 == round.config.rounds.count:
        yield
        return
    over = threading.Event()
    work = _sample_ahead if round.config.rollout.ahead else _start_generators
    thread = threading.Thread(target=work, args=(round, fleet, prompts, over), name="next-round", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
    thread.join(timeout=STAGE_STALL_S)
    if thread.is_alive():
        raise StageError(f"completions sampled ahead were not complete {STAGE_STALL_S:.0f} s after the training ended")


def _sample_ahead(round: Round, fleet: "Fleet", prompts: Sequence[Part], over: threading.Event) -> None:
    config, index = round.config, round.index + 1
    folder = round.run.place.at("rounds", str(index))
    try:
        order = prompts_of(config, index, sum(part.rows for part in prompts))
        parts = reorder(prompts, order, StageOutput(folder.at("prompts")), stages.PART_PROMPTS)
        out = StageOutput(folder.at("completions"), enough=over.is_set)
        made = sample(config, index, parts, out, fleet.generators, weights=None)
    except Exception as error:  # of any kind: the next round samples again, and fails if it must
        round.reporter.note(f"no more completions were sampled ahead: {error}")
    else:
        round.reporter.note(f"sampled ahead for round {index + 1}: {sum(part.rows for part in made)} completions")


def _start_generators(round: Round, fleet: "Fleet", prompts: Sequence[Part], over: threading.Event) -> None:
    while not over.wait(CHECK_EVERY_S):
        if round.seconds_left is not None and round.seconds_left < fleet.start_seconds:
            fleet.start_generators(round.config.fleet.generators, round.end)
            return
