"""The loop: iterative preference optimisation, online and offline."""

from collections.abc import Sequence

from sampo_ray.loop.ahead import prepare_next_round
from sampo_ray.loop.evaluating import Evaluation
from sampo_ray.loop.fleet import Fleet
from sampo_ray.loop.rounds import Reporter, Round, tokenize, unfinished
from sampo_ray.run.directory import Run
from sampo_ray.run.parts import Part
from sampo_ray.run.storage import Place


def iterate(run: Run, fleet: Fleet, reporter: Reporter) -> Place:
    """Iterative preference optimisation: each round starts from the last round's policy, which is its reference.

    Returns the folder of the exported model. A resumed run does only what is not finished. Raises StageError or
    TrainingError with a reason to show to the user.
    """
    fleet.attach(run)
    reporter.begin_run(run.place)
    evaluation = Evaluation(run, reporter)  # none unless it is asked for
    data = evaluation.hold_out(tokenize(run, reporter))
    for round in unfinished(run, reporter):
        evaluation.of_base(round, fleet)
        votes = round.feedback()  # pairs that the users' votes make
        # What the pairs are made of is named nowhere, so that the object store need not hold it while the round trains.
        pairs = round.pairs(rollouts(round, fleet, data) if run.config.online else data, votes)
        pairs = round.reference(pairs, fleet.references)
        fleet.give_gpus("ranks")
        with prepare_next_round(round, fleet, data):
            for step in round.train(pairs, fleet.trainer):  # publishes versions on its way
                round.record(step)
        evaluation.of_round(round, fleet)  # which may end the run
        round.commit()  # it is never done again
    fleet.give_gpus("engines")
    fleet.await_checks(reporter.note)
    return run.finish()


def rollouts(round: Round, fleet: Fleet, prompts: Sequence[Part]) -> list[Part]:
    """Preference pairs from the round's policy: n completions a prompt, scored, the best against the worst."""
    fleet.give_gpus("engines")
    completions = round.sample(round.prompts(prompts), fleet.generators)
    return round.best_against_worst(round.score(completions, fleet.rewards))
