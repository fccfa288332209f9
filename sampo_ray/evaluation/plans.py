"""What a task will ask, known before anything is asked; and which harness plans and runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import Conditions, TaskResult
from sampo_ray.evaluation.tasks import Task

if TYPE_CHECKING:  # they import torch, for which a mistake in the command line need not wait
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.evaluation.alpaca_eval import AlpacaSettings
    from sampo_ray.evaluation.subject import Subject


@dataclass(frozen=True)
class Asking:
    """How tasks are run. `limit`: samples of each task, the first ones; `max_tokens`: of an answer, instead of what the
    task says; `data`: the folder with the data sets."""

    limit: int | None = None
    seed: int = 1234
    max_tokens: int | None = None
    data: Path | None = None
    alpaca: "AlpacaSettings | None" = None
    """What the task alpaca_eval needs besides."""

    def judged(self, task: Task) -> "AlpacaSettings":
        if self.alpaca is None:
            raise EvaluationError(
                f"tasks: {task.name} needs a judge and the official files; give --judge and --alpaca-data"
            )
        return self.alpaca


@dataclass(frozen=True)
class Plan:
    """What a task will ask. `conditions` have all that is known before."""

    task: Task
    count: int
    """Requests: each choice is one."""
    first_text: str
    stop: tuple[str, ...]
    conditions: Conditions
    judge_calls: int = 0
    """Of a judge's endpoint, at most."""

    @property
    def needs(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return (self.conditions.longest_prompt or 0) + (self.conditions.max_tokens or 1)


def plan(task: Task, chat: "ChatFormat", context: int, asking: Asking, dtype: str | None = None) -> Plan:
    """Builds all prompts without asking anything; `context`: see `Subject`. EvaluationError where the task cannot be
    run like this."""
    # Each harness is a package of its own, and may not be installed.
    if task.kind == "judged":
        from sampo_ray.evaluation import alpaca_eval

        found = alpaca_eval.plan(chat, context, asking.judged(task), dtype)
        first = chat.render(found.questions[0].messages)
        return Plan(task, len(found.questions), first, (), found.conditions, found.judge_calls)
    if task.kind == "verified":
        from sampo_ray.evaluation import ifbench

        return ifbench.plan(task, chat, context, asking, dtype)
    from sampo_ray.evaluation import harness

    return harness.plan(task, chat, context, asking, dtype)


def run(task: Task, subject: "Subject", asking: Asking) -> tuple[TaskResult, bytes]:
    """The result of a task and its samples, a JSON line each. EvaluationError where there is no honest score."""
    if task.kind == "judged":
        from sampo_ray.evaluation import alpaca_eval

        return alpaca_eval.run(subject, asking.judged(task))
    if task.kind == "verified":
        from sampo_ray.evaluation import ifbench

        return ifbench.run(task, subject, asking)
    from sampo_ray.evaluation import harness

    return harness.run(task, subject, asking)
