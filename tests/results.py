"""Run directories with results of evaluations, as `sampo evaluate` leaves them, without a model."""

import json
import random
from pathlib import Path

from sampo_ray.config.run import load_config
from sampo_ray.evaluation.records import Conditions, JudgeRecord, Score, TaskResult, write_result
from sampo_ray.evaluation.statistics import Z, standard_error
from sampo_ray.judging.tally import Tally
from sampo_ray.run.directory import create_run
from sampo_ray.run.storage import Place

METHODS = {
    "dpo": ["method.reduction=sum", "rounds.count=1", "rounds.epochs=3"],
    "iterative-dpo": ["method.reduction=sum"],
    "iterative-sampo": [],
}


def run_of(folder: Path, method: str, model: str = "meta-llama/Meta-Llama-3-8B-Instruct") -> Place:
    """A run directory with its configuration and manifest."""
    tree = {"model": {"path": model}, "data": {"train": "some/pairs:train"}, "run": {"dir": str(folder / method)}}
    return create_run(load_config(tree, METHODS[method])).place


def evaluated(
    run: Place,
    version: int | None,
    label: str,
    rate: float,
    tokens: float,
    count: int = 200,
    draw: int = 0,
    **conditions: object,
) -> None:
    """Gives a version results of gsm8k and alpaca_eval: `rate` of the samples are right, or won."""
    model = "Meta-Llama-3-8B-Instruct"
    about = {"run": run.name, "version": version, "label": label, "model": model, "seconds": 1.0, "created": 1}
    same = {"total": 1319, "limit": count, "route": "chat", "max_tokens": 256, "template": "ab12"}
    drawn = random.Random(draw + (version or 0))
    hits = [float(drawn.random() < rate) for _ in range(count)]
    sizes = [max(1, int(drawn.gauss(tokens, 60))) for _ in range(count)]
    judged = {"limit": None, "total": count, "judge": judge()}
    for task, names, settings in (
        ("gsm8k", ("exact_match,strict-match",), {"shots": 8, "card_shots": 8, "shots_form": "turns"}),
        ("alpaca_eval", ("win_rate,judge", "length_controlled_winrate,judge", "tokens,llama3"), judged),
    ):
        values = [sizes if name.startswith("tokens") else hits for name in names]
        scores = tuple(score(name, list(map(float, of))) for name, of in zip(names, values, strict=True))
        lines = [
            {"id": f"{task}/{n}", "scores": dict(zip(names, of, strict=True)), "tokens": sizes[n], **texts(sizes[n])}
            for n, of in enumerate(zip(*values, strict=True))
        ]
        met = Conditions(**{**same, **settings, **conditions})
        samples = "".join(json.dumps(line) + "\n" for line in lines).encode()
        write_result(run, TaskResult(task=task, scores=scores, conditions=met, **about), samples)


def texts(tokens: int) -> dict[str, str]:
    """An answer of that many words, and the reference's."""
    return {"answer": "word " * tokens, "reference": "**A list**\n- one\n" + "word " * 400}


def score(name: str, values: list[float]) -> Score:
    mean, error = sum(values) / len(values), standard_error(values) or 0.0
    unit = "tokens" if name.startswith("tokens") else "share"
    bounds = {"low": mean - Z * error, "high": mean + Z * error}
    return Score(name=name, value=mean, unit=unit, stderr=error, count=len(values), **bounds)


def judge(spread: float | None = 0.002) -> JudgeRecord:
    return JudgeRecord(
        name="a-judge", preset="alpaca_eval", weighted=True, tally=Tally(calls=400), repeats=3, repeat_spread=spread
    )


def four_rows(folder: Path) -> list[Place]:
    """The runs of a table of four rows, with results after each round, and of the base in the first."""
    runs = [run_of(folder, method) for method in METHODS]
    evaluated(runs[0], 0, "base", 0.23, 421)
    evaluated(runs[0], 100, "final", 0.25, 424)
    for at, (run, step, shorter) in enumerate(((runs[1], 0.03, 2), (runs[2], 0.07, -14))):
        evaluated(run, 0, "base", 0.23, 421)
        for round in (1, 2, 3):
            evaluated(run, 100 * round, f"round-{round}", 0.23 + round * step, 421 + round * shorter, draw=at)
    return runs
