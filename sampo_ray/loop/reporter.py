"""What the loop reports while it works; the display implements it."""

from contextlib import AbstractContextManager
from typing import Protocol

from sampo_ray.run.steps import StepMetrics
from sampo_ray.run.storage import Place


class StageReporter(Protocol):
    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""


class Reporter(Protocol):
    def begin_run(self, run: Place) -> None:
        """What follows belongs to the run in this directory."""

    def begin_round(self, index: int, count: int) -> None:
        """Round `index` (from 0) of `count` begins."""

    def stage(self, name: str, total: int | None, unit: str) -> AbstractContextManager[StageReporter]:
        """A stage of `total` units (None: unknown), such as `stage("generate", 64, "prompts")`."""

    def metrics(self, step: StepMetrics) -> None:
        """An optimizer step is done."""

    def version(self, number: int) -> None:
        """Policy version `number` is published."""

    def note(self, text: str) -> None:
        """A line that the user should see and keep."""
