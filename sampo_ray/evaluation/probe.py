"""What a version's answers to the probe prompts say of it, against the base and the version that its round started
from; and when it counts as collapsed. Decisions are functions of stored results: a resumed run makes the same ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sampo_ray.config.evaluation import CollapseConfig
from sampo_ray.config.sections import RewardConfig
from sampo_ray.evaluation.records import FOLDER, MOST_LOST, JudgeRecord, Score, TaskResult, Unit, read_result
from sampo_ray.evaluation.statistics import mean_interval, slope, standard_error, wilson
from sampo_ray.judging.tally import Tally
from sampo_ray.run.storage import Place

TASK = "probe"
WIN_RATE_BASE, WIN_RATE_PREVIOUS = "win_rate_base", "win_rate_previous"
TOKENS, REWARD, SLOPE = "mean_tokens", "mean_reward", "reward_slope"
FOLLOWED, LOST = "instructions_followed", "lost"


@dataclass(frozen=True)
class Answer:
    """A version's answer to a probe prompt. `followed`: which of the prompt's verifiable instructions it follows, None
    where there are none."""

    prompt: str
    """Its id."""
    question: str
    text: str
    tokens: int
    finish_reason: str
    reward: float | None
    followed: tuple[bool, ...] | None = None

    @property
    def empty(self) -> bool:
        return not self.text.strip()

    @property
    def lost(self) -> bool:
        return self.empty or self.finish_reason != "stop"


Answers = Sequence[Answer]
"""One for each probe prompt, in their order."""


def scores(answers: Answers, base: Answers | None = None, previous: Answers | None = None) -> tuple[Score, ...]:
    """The scores of a version. Of the base alone there are no win rates; nor where rewards are missing for more than
    MOST_LOST of the prompts."""
    tokens = [float(answer.tokens) for answer in answers]
    lost = sum(answer.lost for answer in answers)
    found = [
        _win_rate(WIN_RATE_BASE, answers, base),
        _win_rate(WIN_RATE_PREVIOUS, answers, previous),
        _mean(TOKENS, tokens, "tokens"),
        *_of_rewards(answers),
        _followed(answers),
        _share(LOST, lost, len(answers)),
    ]
    return tuple(score for score in found if score is not None)


def _win_rate(name: str, answers: Answers, others: Answers | None) -> Score | None:
    """Share of prompts with the higher reward, ties half, with Wilson's interval: that of wins and losses alone is
    narrower, and has no width where all are won."""
    if others is None:
        return None
    wins = [won for a, b in zip(answers, others, strict=True) if (won := _won(a, b)) is not None]
    if not wins or len(answers) - len(wins) > MOST_LOST * len(answers):
        return None
    low, high = wilson(sum(wins), len(wins))
    error = standard_error(wins)
    return Score(name=name, value=fmean(wins), stderr=error, low=low, high=high, count=len(wins))


def _won(answer: Answer, other: Answer) -> float | None:
    if answer.reward is None or other.reward is None:
        return None
    return 0.5 if answer.reward == other.reward else float(answer.reward > other.reward)


def _of_rewards(answers: Answers) -> list[Score | None]:
    """Mean reward, and the slope of reward over tokens: what a longer answer gains."""
    scored = [(float(answer.tokens), answer.reward) for answer in answers if answer.reward is not None]
    if not scored:
        return []
    lengths, rewards = zip(*scored, strict=True)
    fit = slope(lengths, rewards)
    line = None if fit is None else Score(name=SLOPE, value=fit[0], unit="slope", stderr=fit[1], count=len(scored))
    return [_mean(REWARD, rewards, "reward"), line]


def _followed(answers: Answers) -> Score | None:
    """Of all instructions of all prompts, as IFEval counts them."""
    every = [each for answer in answers for each in answer.followed or ()]
    return _share(FOLLOWED, sum(every), len(every)) if every else None


def _share(name: str, count: int, of: int) -> Score:
    low, high = wilson(count, of)
    return Score(name=name, value=count / of, low=low, high=high, count=of)


def _mean(name: str, values: Sequence[float], unit: Unit) -> Score:
    low, high = mean_interval(values) or (None, None)
    error = standard_error(values)
    return Score(name=name, value=fmean(values), unit=unit, stderr=error, low=low, high=high, count=len(values))


def collapse(limits: CollapseConfig, result: TaskResult, previous: TaskResult) -> str | None:
    """Why a version counts as collapsed against the one that its round started from; None where it does not."""
    rate = result.score(WIN_RATE_PREVIOUS)
    if rate is not None and rate.high is not None and rate.high < limits.win_rate:
        return (
            f"win rate of {rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f}) against the version before is below "
            f"evaluate.collapse.win_rate={limits.win_rate:g}"
        )
    now, before = _value(result, TOKENS), _value(previous, TOKENS)
    if now > limits.growth * before or now * limits.growth < before:
        return (
            f"mean answer of {now:.1f} tokens after {before:.1f} is a change beyond "
            f"evaluate.collapse.growth={limits.growth:g}"
        )
    now, before = _value(result, LOST), _value(previous, LOST)
    if now > limits.lost >= before:
        return (
            f"share of empty or cut answers rose from {before:.2f} to {now:.2f}, above "
            f"evaluate.collapse.lost={limits.lost:g}"
        )
    return None


def _value(result: TaskResult, name: str) -> float:
    score = result.score(name)
    assert score is not None, f"probes have a score {name}"
    return score.value


def as_jsonl(answers: Answers, base: Answers | None = None, previous: Answers | None = None) -> bytes:
    """The samples of a result, a line a prompt: `scores` has what each score of that name is the mean of."""
    lines = []
    for at, answer in enumerate(answers):
        rates = {
            name: _won(answer, others[at])
            for name, others in ((WIN_RATE_BASE, base), (WIN_RATE_PREVIOUS, previous))
            if others is not None
        }
        values = {**rates, TOKENS: answer.tokens, REWARD: answer.reward, LOST: float(answer.lost)}
        sample = {
            "id": answer.prompt,
            "prompt": answer.question,
            "answer": answer.text,
            "tokens": answer.tokens,
            "finish": answer.finish_reason,
            "followed": answer.followed,
            "scores": {name: value for name, value in values.items() if value is not None},
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


def line(result: TaskResult) -> str:
    """A result in a line, for the display."""
    parts = []
    for name, text in ((WIN_RATE_BASE, "win rate against base"), (WIN_RATE_PREVIOUS, "against the version before")):
        if (score := result.score(name)) is not None:
            parts.append(f"{text} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})")
    if (tokens := result.score(TOKENS)) is not None:
        reach = "" if tokens.high is None else f" ± {tokens.high - tokens.value:.1f}"
        parts.append(f"tokens {tokens.value:.1f}{reach}")
    if (gain := result.score(SLOPE)) is not None:
        parts.append(f"reward a token {gain.value:+.2g} ± {gain.stderr or 0:.1g}")
    if (followed := result.score(FOLLOWED)) is not None:
        parts.append(f"instructions followed {followed.value:.0%}")
    if (lost := result.score(LOST)) is not None and lost.value:
        parts.append(f"empty or cut {lost.value:.0%}")
    return f"probe of {result.label}: " + ", ".join(parts)


def judged_by(reward: RewardConfig, tally: Tally) -> JudgeRecord | None:
    """Who scored the answers. Functions and models say the same again; what repeats of a judge would say is unknown."""
    if not reward.parts:
        return None
    judge = next((part.judge for part in reward.parts if part.judge is not None), None)
    names = [part.judge.model if part.judge else part.model or part.function for part in reward.parts]
    return JudgeRecord(
        name=" + ".join(str(name) for name in names),
        preset=judge.preset if judge else "reward",
        weighted=bool(judge and judge.weighted),
        mode=judge.mode if judge else "reward",
        seed=judge.seed if judge else 0,
        tally=tally,
        repeat_spread=None if judge else 0.0,
    )


def brief(result: TaskResult | None) -> str:
    """A result for a column of a table; `-` for none."""
    if result is None:
        return "-"
    rate, tokens = result.score(WIN_RATE_BASE), _value(result, TOKENS)
    return f"{tokens:.0f} tok" if rate is None else f"{rate.value:.0%} of base, {tokens:.0f} tok"


def results_by_version(run: Place) -> dict[int, TaskResult]:
    """The probes of a run's versions."""
    results = (read_result(run.at(FOLDER, subject, TASK)) for subject in run.at(FOLDER).names())
    return {result.version: result for result in results if result is not None and result.version is not None}
