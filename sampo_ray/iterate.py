"""The loop: iterative preference optimisation, online and offline."""

from collections.abc import Sequence

from sampo_ray.loop.ahead import readied
from sampo_ray.loop.display import Display
from sampo_ray.loop.fleet import Fleet
from sampo_ray.loop.rounds import Round, tokenize
from sampo_ray.run.directory import Run
from sampo_ray.run.parts import Part
from sampo_ray.run.storage import Place


def iterate(run: Run, fleet: Fleet, display: Display) -> Place:
    """Iterative preference optimisation: each round starts from, and is held to, the last round's policy.

    Returns the place of the exported model. What a resumed run has finished already is not done again. Raises
    StageError or TrainingError with a reason to show.
    """
    fleet.attach(run)
    display.work_on(run.place)
    data = tokenize(run, display)
    for index in range(run.config.rounds.count):
        round = Round(run, index, display)
        if round.committed:
            continue
        said = round.feedback()  # pairs that the users' votes make
        source = rollouts(round, fleet, data) if run.config.online else data
        pairs = round.reference(round.pairs(source, said), fleet.references)
        with readied(round, fleet, data):  # meanwhile, for the next round
            for step in round.train(pairs, fleet.trainer):  # publishes on its way
                round.record(step)
        round.commit()  # the manifest now says: never again
    return run.finish()


def rollouts(round: Round, fleet: Fleet, prompts: Sequence[Part]) -> list[Part]:
    """Preference pairs of the round's own policy: n completions a prompt, scored, the best against the worst."""
    completions = round.sample(round.prompts(prompts), fleet.generators)
    return round.best_against_worst(round.score(completions, fleet.rewards))
