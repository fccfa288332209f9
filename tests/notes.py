"""A reporter that keeps what it is told; nothing of it is shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sampo_ray.run.manifest import StepMetrics
from sampo_ray.run.storage import Place


@dataclass
class Stage:
    """A stage and how many of its units are done."""

    name: str
    total: int | None
    unit: str
    done: int = 0

    def advance(self, count: int = 1) -> None:
        self.done += count

    def expect(self, total: int) -> None:
        self.total = total


@dataclass
class Notes:
    """Implements sampo_ray.loop.rounds.Reporter."""

    runs: list[Place] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin_run(self, run: Place) -> None:
        self.runs.append(run)

    def begin_round(self, index: int, count: int) -> None:
        assert index < count
        self.rounds.append(index)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Stage]:
        self.stages.append(Stage(name, total, unit))
        yield self.stages[-1]

    def metrics(self, step: StepMetrics) -> None:
        self.steps.append(step)

    def version(self, number: int) -> None:
        self.versions.append(number)

    def note(self, text: str) -> None:
        self.notes.append(text)
