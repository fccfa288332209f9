"""What the next round's rollouts need, readied while this round trains: their completions, or replicas to draw them."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

from sampo_ray.errors import StageError
from sampo_ray.loop import stages
from sampo_ray.loop.blocks import STALL_SECONDS
from sampo_ray.loop.fleet import Fleet
from sampo_ray.loop.rounds import Round, draw, prompts_of
from sampo_ray.run.parts import Part

LOOK_S = 0.5


@contextlib.contextmanager
def readied(round: Round, fleet: Fleet, prompts: Sequence[Part]) -> Iterator[None]:
    """Around an online round's training: gets the next round's rollouts ready meanwhile.

    With `rollout.ahead` their completions are drawn from whatever weights the replicas hold, so they are older than the
    next round's start by at most this round's steps; what is not drawn by the end of the training is left to the next
    round. Otherwise generators that were scaled down are started again, so that they are there when it begins.
    """
    if not round.config.online or round.index + 1 == round.config.rounds.count:
        yield
        return
    over = threading.Event()
    work = _draw if round.config.rollout.ahead else _grow
    thread = threading.Thread(target=work, args=(round, fleet, prompts, over), name="next-round", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
    thread.join(timeout=STALL_SECONDS)
    if thread.is_alive():
        raise StageError(f"completions drawn ahead were not complete {STALL_SECONDS:.0f} s after the training's end")


def _draw(round: Round, fleet: Fleet, prompts: Sequence[Part], over: threading.Event) -> None:
    config, index = round.config, round.index + 1
    place = round.run.place.at("rounds", str(index))
    try:
        mine = prompts_of(config, index, sum(part.rows for part in prompts))
        parts = stages.gather(prompts, mine, place.at("prompts"), stages.PART_PROMPTS, lambda rows: None)
        drawn = draw(config, index, parts, place.at("completions"), fleet.generators, None, enough=over.is_set)
    except Exception as error:  # whatever it is: the next round asks again, and fails if it must
        round.display.note(f"no more completions were drawn ahead: {error}")
    else:
        round.display.note(f"drawn ahead for round {index + 1}: {sum(part.rows for part in drawn)} completions")


def _grow(round: Round, fleet: Fleet, prompts: Sequence[Part], over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        if round.seconds_left is not None and round.seconds_left < fleet.start_seconds:
            fleet.grow(round.config.fleet.generators, round.end)
            return
