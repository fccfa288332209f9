"""What an optimizer step results in, and its line in metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sampo_ray.run.manifest import Checkpoint

Values = Mapping[str, float | str | None]
"""Metrics by name: numbers, and the reason of a step that was skipped."""


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl: the metrics of step `step` (from 1) of `round` (from 0), which made `version`."""

    round: int
    step: int
    version: int
    values: Values

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics that can be drawn."""
        return {name: value for name, value in self.values.items() if isinstance(value, float)}

    def line(self) -> str:
        return json.dumps({**self.values, "round": self.round, "step": self.step, "version": self.version})


@dataclass(frozen=True)
class StepResult:
    """What the training ranks report of a step: its metrics, and what they stored of the policy after it."""

    metrics: StepMetrics
    published: bool = False
    """Whether its version was published."""
    checkpoint: Checkpoint | None = None


def parse_metrics(lines: Sequence[str]) -> list[StepMetrics]:
    """The steps of lines of metrics.jsonl; one that a crash cut short is left out."""
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [StepMetrics(step.pop("round"), step.pop("step"), step.pop("version"), step) for step in found]
