"""What a task will ask, known before anything is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import Conditions
from sampo_ray.evaluation.tasks import Task

if TYPE_CHECKING:  # it imports torch, for which a mistake in the command line need not wait
    from sampo_ray.evaluation.alpaca_eval import AlpacaSettings


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
