"""What a task will ask, known before anything is asked; and which harness plans and runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import Conditions, TaskResult
from sampo_ray.evaluation.tasks import Task

if TYPE_CHECKING:  # they import torch, for which a mistake in the command line need not wait
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.evaluation.subject import Subject


@dataclass(frozen=True)
class Asking:
    """How tasks are run. `limit`: samples of each task, the first ones; `max_tokens`: of an answer, instead of what the
    task says; `data`: the folder with the data sets."""

    limit: int | None = None
    seed: int = 1234
    max_tokens: int | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What a task will ask. `conditions` have all that is known before."""

    task: Task
    count: int
    """Requests: each choice is one."""
    first_text: str
    stop: tuple[str, ...]
    conditions: Conditions

    @property
    def needs(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return (self.conditions.longest_prompt or 0) + (self.conditions.max_tokens or 1)


def plan(task: Task, chat: "ChatFormat", context: int, asking: Asking, dtype: str | None = None) -> Plan:
    """Builds all prompts without asking anything; `context`: see `Subject`. EvaluationError where the task cannot be
    run like this."""
    # Each harness is a package of its own, and may not be installed.
    if task.kind in ("generative", "likelihood"):
        from sampo_ray.evaluation import harness

        return harness.plan(task, chat, context, asking, dtype)
    raise EvaluationError(f"tasks: {task.name} is not run by `sampo evaluate`")


def run(task: Task, subject: "Subject", asking: Asking) -> tuple[TaskResult, bytes]:
    """The result of a task and its samples, a JSON line each. EvaluationError where there is no honest score."""
    from sampo_ray.evaluation import harness

    return harness.run(task, subject, asking)
