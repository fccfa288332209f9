"""Who compares answers with the baseline's: a judge behind an endpoint, or a reward model or function."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from sampo_ray.config.sections import RewardSource
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.reward_functions import call_function, load_function
from sampo_ray.data.rewards import Rewards, Samples, Scorer
from sampo_ray.errors import EvaluationError, JudgeError
from sampo_ray.evaluation.records import MOST_LOST, JudgeRecord
from sampo_ray.evaluation.win_rates import spread_of
from sampo_ray.judging.cache import Cache
from sampo_ray.judging.judge import Comparison, Judge, decided
from sampo_ray.judging.tally import Tally
from sampo_ray.run.storage import Place, absolute
from sampo_ray.sources.messages import Message

TOGETHER = 64
"""Rows that are judged before it is looked at how many have no verdict."""

Kind = Literal["judge", "grades", "reward"]
"""`judge`: answers are compared, in both orders. `grades`: each is rated by a judge, `reward`: by a reward model or
function; the better rated one wins. They are different numbers, and named so."""


@dataclass(frozen=True)
class Row:
    """What is compared: our answer (None: there is none) and the baseline's."""

    prompt: Sequence[Message]
    ours: str | None
    theirs: str


@dataclass(frozen=True)
class Preferences:
    """How far each of our answers is preferred, 0 to 1, or None; for each repeat. `record` has no `repeat_spread`."""

    repeats: list[list[float | None]]
    record: JudgeRecord

    @property
    def means(self) -> list[float | None]:
        """Over the repeats; None where one has no verdict."""
        rows = zip(*self.repeats, strict=True)
        return [None if None in row else sum(each for each in row if each is not None) / len(row) for row in rows]

    def with_spread(self, rates: Sequence[float]) -> JudgeRecord:
        """The record with the spread of a rate over the repeats: 0 where what judges is deterministic."""
        spread = spread_of(rates) if self.record.repeats > 1 else None
        alike = self.record.mode == "reward"
        return self.record.model_copy(update={"repeat_spread": 0.0 if alike else spread})


def read_judge(file: Path) -> RewardSource:
    """What judges, of a YAML file with `judge: {url: ..., model: ...}`, `model:` or `function:`, or with the fields of
    a judge alone. EvaluationError."""
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvaluationError(f"judge: {file} cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(tree, dict):
        raise EvaluationError(f"judge: {file} holds no fields; write url and model of a judge, or model or function")
    try:
        source = RewardSource.model_validate({"judge": tree} if "url" in tree else tree)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # an input may be a key
        where = ".".join(map(str, first["loc"]))
        raise EvaluationError(f"judge: {file}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    if not source.kinds:
        raise EvaluationError(f"judge: {file} names neither a judge (url and model) nor a reward model or function")
    return source


def kind_of(source: RewardSource) -> Kind:
    if source.judge is None:
        return "reward"
    return "judge" if source.judge.mode == "pairwise" else "grades"


def checked(source: RewardSource) -> RewardSource:
    """The source, tried: a judge by one call, which decides how its verdicts are weighted; a function is loaded.
    EvaluationError, ConfigError."""
    if (judge := source.judge) is not None:
        if judge.cache is not None:  # a task may run in another working directory
            judge = judge.model_copy(update={"cache": absolute(judge.cache)})
        try:
            return source.model_copy(update={"judge": decided(judge)})
        except JudgeError as error:
            raise EvaluationError(f"judge: {error}") from None
    if source.function is not None:
        load_function(source.function)
    return source


def calls_of(source: RewardSource, rows: int, repeats: int) -> int:
    """Calls of a judge at most: two orders of each row, or a grade of both answers."""
    return 0 if source.judge is None else 2 * rows * repeats


def preferences(
    source: RewardSource, rows: Sequence[Row], chat: ChatFormat, repeats: int, verdicts: Place | None
) -> Preferences:
    """`source` is `checked`. EvaluationError as soon as more than MOST_LOST of the rows have no verdict."""
    if source.judge is None:
        return Preferences([_better(_scorer(source), rows, chat)], planned(source, 1))
    place = Place(source.judge.cache) if source.judge.cache else verdicts
    with Judge(source.judge, Cache(place) if place else None) as judge:
        found = [_judged(judge, rows, repeat) for repeat in range(repeats)]
    tally = sum((tally for _, tally in found), Tally())
    return Preferences([values for values, _ in found], planned(source, repeats).model_copy(update={"tally": tally}))


def _judged(judge: Judge, rows: Sequence[Row], repeat: int) -> tuple[list[float | None], Tally]:
    values, tally = list[float | None](), Tally()
    for begin in range(0, len(rows), TOGETHER):
        some = [row for row in rows[begin : begin + TOGETHER] if row.ours is not None]
        if judge.config.mode == "pairwise":
            pairs = [Comparison(row.prompt, str(row.ours), row.theirs) for row in some]
            found = judge.compare(pairs, both_orders=True, repeat=repeat)
            shares, tally = found.values, tally + found.tally
        else:
            answers = [(row.prompt, text) for row in some for text in (str(row.ours), row.theirs)]
            found = judge.grade(answers, repeat=repeat)
            shares, tally = _wins(found.values[::2], found.values[1::2]), tally + found.tally
        given = iter(shares)
        values += [None if row.ours is None else next(given) for row in rows[begin : begin + TOGETHER]]
        lost = values.count(None)
        if lost > MOST_LOST * len(rows):
            raise EvaluationError(
                f"the judge {judge.config.model!r} gives no score: {lost} of the first {len(values)} answers have no "
                f"verdict, more than {MOST_LOST:.0%} of {len(rows)} ({tally.text()}); use another judge"
            )
    return values, tally


def _better(score: Scorer, rows: Sequence[Row], chat: ChatFormat) -> list[float | None]:
    """1 where ours has the higher reward, 0 where it has the lower, 1/2 for equal ones."""
    some = [row for row in rows if row.ours is not None]
    prompts = [list(row.prompt) for row in some]
    ours, theirs = (
        score(Samples(prompts, texts, chat.encode_responses(texts), {}))
        for texts in ([str(row.ours) for row in some], [row.theirs for row in some])
    )
    given = iter(_wins(ours, theirs))
    values = [None if row.ours is None else next(given) for row in rows]
    if (lost := values.count(None)) > MOST_LOST * len(rows):
        raise EvaluationError(f"the reward source has no reward for {lost} of {len(rows)} answers; there is no score")
    return values


def _wins(ours: Rewards, theirs: Rewards) -> list[float | None]:
    return [
        None if a is None or b is None else 0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)
    ]


def _scorer(source: RewardSource) -> Scorer:
    if source.function is None:
        import torch

        from sampo_ray.data.reward_models import RewardModel

        assert source.model is not None
        return RewardModel(source.model, "cuda" if torch.cuda.is_available() else "cpu")
    function = load_function(source.function)
    return lambda samples: call_function(function, samples, source.arguments)


def planned(source: RewardSource, repeats: int) -> JudgeRecord:
    """Who will judge. A reward model or function needs no repeats."""
    if (judge := source.judge) is None:
        return JudgeRecord(name=str(source.model or source.function), preset="reward", weighted=False, mode="reward")
    who = {"name": judge.model, "preset": judge.preset, "mode": judge.mode, "seed": judge.seed, "repeats": repeats}
    return JudgeRecord.model_validate({**who, "weighted": bool(judge.weighted)})
