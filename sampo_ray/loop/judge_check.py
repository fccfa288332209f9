"""Tries the judges that a run names as reward sources: what they can give, and what a round asks of them."""

from sampo_ray.config.judging import JudgeConfig
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import RewardConfig
from sampo_ray.errors import ConfigError, JudgeError
from sampo_ray.judging.judge import decided
from sampo_ray.judging.ranking import calls_of
from sampo_ray.run.storage import absolute

QUESTION_TOKENS = 200
"""About how many a judge's own words take."""


def check_judges(config: RunConfig) -> tuple[RewardConfig, list[str]]:
    """Calls each judge once. Returns the rewards' configuration with what judges left open decided, and notes on what
    they cost. ConfigError for one that cannot be used."""
    reward = config.reward
    if reward.judge is not None:
        judge = _tried("reward.judge", reward.judge)
        return reward.model_copy(update={"judge": judge}), _notes("reward.judge", judge, config)
    parts, notes = [], list[str]()
    for n, part in enumerate(reward.sum):
        if part.judge is not None:
            judge = _tried(f"reward.sum.{n}.judge", part.judge)
            part, notes = (
                part.model_copy(update={"judge": judge}),
                notes + _notes(f"reward.sum.{n}.judge", judge, config),
            )
        parts.append(part)
    return reward.model_copy(update={"sum": tuple(parts)}), notes


def _tried(field: str, judge: JudgeConfig) -> JudgeConfig:
    if judge.cache is not None:  # workers have other working directories
        judge = judge.model_copy(update={"cache": absolute(judge.cache)})
    try:
        return decided(judge)
    except JudgeError as error:
        raise ConfigError(f"{field}: {error}") from None


def _notes(field: str, judge: JudgeConfig, config: RunConfig) -> list[str]:
    rollout, pairwise = config.rollout, judge.mode == "pairwise"
    each = calls_of(rollout.samples) if pairwise else rollout.samples
    tokens = config.limits.prompt_limit + rollout.max_tokens * (2 if pairwise else 1) + QUESTION_TOKENS
    calls = f"{each} calls for the {rollout.samples} completions of a prompt"
    if rollout.prompts:
        calls += f", {each * rollout.prompts:,} a round"
    how = "weighted by log-probs" if judge.weighted else "without log-probs"
    return [
        f"{field}: {judge.model} at {judge.url} answers; {judge.mode}, preset {judge.preset}, verdicts {how}",
        f"{field}: at most {calls}, of up to {tokens:,} tokens each",
    ]
