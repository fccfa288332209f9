"""What the user sees of a run: a live display on a terminal, plain lines elsewhere. Both implement `Reporter`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from sampo_ray.run.directory import Activity, Status, StatusFile
from sampo_ray.run.manifest import StepMetrics
from sampo_ray.run.storage import Place

BETWEEN_LINES_S = 5.0
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "margin": ("margin", "{:+.4f}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "chosen_tokens": ("chosen", "{:.0f} tok"),
    "rejected_tokens": ("rejected", "{:.0f} tok"),
}
"""The metrics of a step that are shown: name and format."""


@dataclass
class Stage:
    """The progress of one stage of a round."""

    name: str
    total: int | None
    unit: str
    clock: Callable[[], float]
    started: float
    advanced: Callable[["Stage"], None]
    done: int = 0

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.advanced(self)

    def expect(self, total: int) -> None:
        self.total = total

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started

    @property
    def pace(self) -> float | None:
        """Units per second; None while unknown."""
        return self.done / elapsed if self.done and (elapsed := self.elapsed) > 0 else None

    def activity(self) -> Activity:
        facts = {"name": self.name, "done": self.done, "total": self.total, "unit": self.unit}
        return Activity.model_validate({**facts, "seconds": self.elapsed, "rate": self.pace})

    def amount(self) -> str:
        return f"{self.done:,} {self.unit}" if self.total is None else f"{self.done:,}/{self.total:,} {self.unit}"

    def rate(self) -> str:
        """Units per second, or seconds per unit where that reads better; empty while unknown."""
        if (pace := self.pace) is None:
            return ""
        if pace >= 10:
            return f"{pace:,.0f}/s"
        return f"{pace:.1f}/s" if pace >= 1 else f"{1 / pace:.1f} s each"

    def left(self) -> str:
        """Time left at the present pace; empty while unknown and at the end."""
        if self.total is None or not self.done or self.done >= self.total:
            return ""
        return f"{duration(self.elapsed / self.done * (self.total - self.done))} left"

    def progress(self) -> str:
        return f"{self.name}: " + ", ".join(filter(None, (self.amount(), self.rate(), self.left())))

    def result(self) -> str:
        """The line at the stage's end; both numbers where units are missing."""
        if not self.done and self.total is None:
            return f"{self.name}: {duration(self.elapsed)}"
        amount = f"{self.done:,} {self.unit}" if self.done == self.total else self.amount()
        return ", ".join(filter(None, (f"{self.name}: {amount} in {duration(self.elapsed)}", self.rate())))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Display(ABC):
    """Implements `rounds.Reporter`: shows a run, and writes its status file. A context manager; see `open_display`."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._round = ""
        self._facts: dict[str, str] = {}
        self._changed = False
        self._file: StatusFile | None = None
        self._status = Status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()

    def begin_run(self, run: Place) -> None:
        if self._file:
            self._file.close()
        self._file, self._status = StatusFile(run), Status()

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Stage]:
        def advanced(stage: Stage) -> None:
            self._on_advance(stage)
            self._write(stage=stage.activity())

        stage = Stage(name, total, unit, self.clock, self.clock(), advanced)
        self._on_begin(stage)
        self._write(stage=stage.activity())
        try:
            yield stage
        finally:
            self._on_end(stage)
            self._write(stage=None)

    @abstractmethod
    def _on_begin(self, stage: Stage) -> None: ...

    @abstractmethod
    def _on_advance(self, stage: Stage) -> None: ...

    def _on_end(self, stage: Stage) -> None:
        self._print(stage.result())

    def begin_round(self, index: int, count: int) -> None:
        self._round = f"round {index + 1}/{count}"
        self._write(round=index + 1, rounds=count)

    def metrics(self, step: StepMetrics) -> None:
        values = step.values
        if values.get("skipped"):
            self.note(f"step {step.step} was skipped: {values['reason']}")
        self._show({name: form.format(values[metric]) for metric, (name, form) in SHOWN.items() if metric in values})

    def version(self, number: int) -> None:
        self._show({"policy": f"v{number}"})

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Something new begins, such as another run; what was shown of the last one is cleared."""
        self._round, self._facts, self._changed = "", {}, False
        self.note(f"--- {text}")

    def _write(self, **changes: object) -> None:
        if self._file:
            self._status = self._status.model_copy(update=changes)
            self._file.update(self._status)

    def _show(self, facts: dict[str, str]) -> None:
        self._facts.update(facts)
        self._changed = True

    def _print(self, line: str) -> None:
        """A line about a stage: round, line, and facts if they have changed since the last one."""
        facts, self._changed = (self._facts_line() if self._changed else ""), False
        self.note("  ".join(filter(None, (self._round, line, facts))))

    def _facts_line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._facts.items())


class LiveDisplay(Display):
    """At the foot of the terminal a status line and a bar for each running stage; ended stages leave a line above."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._running: dict[TaskID, Stage] = {}
        name, amount = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[amount]}"))
        rate = TextColumn("{task.fields[rate]}", style="cyan", markup=False)
        left = TextColumn("{task.fields[left]}", style="magenta", markup=False)
        columns = name, BarColumn(bar_width=24), amount, rate, left
        self._bars = Progress(*columns, console=console, auto_refresh=False)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        super().__exit__(*exception)

    def _on_begin(self, stage: Stage) -> None:
        task = self._bars.add_task(stage.name, total=stage.total, amount=stage.amount(), rate="", left="")
        self._running[task] = stage

    def _on_advance(self, stage: Stage) -> None:
        """The next refresh shows it."""

    def _on_end(self, stage: Stage) -> None:
        for task in [task for task, running in self._running.items() if running is stage]:
            del self._running[task]
            self._bars.remove_task(task)
        super()._on_end(stage)

    def _render(self) -> RenderableType:
        for task, stage in list(self._running.items()):
            rate, left = stage.rate(), stage.left()
            self._bars.update(
                task, total=stage.total, completed=stage.done, amount=stage.amount(), rate=rate, left=left
            )
        line = "  ".join(filter(None, (self._round, self._facts_line())))
        return Group(Text(line, style="bold", no_wrap=True, overflow="ellipsis"), self._bars)


class PlainDisplay(Display):
    """Lines for logs and pipes: one when a stage begins and ends, and at most one every BETWEEN_LINES_S meanwhile."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        console.width = 160  # a pipe has no width, and rich would cut tables to 80 columns
        self._last_line = clock()

    def note(self, text: str) -> None:
        self._last_line = self.clock()
        super().note(text)

    def _on_begin(self, stage: Stage) -> None:
        of = "" if stage.total is None else f": {stage.total:,} {stage.unit}"
        self._print(f"{stage.name} begins{of}")

    def _on_advance(self, stage: Stage) -> None:
        if stage.done != stage.total and self.clock() - self._last_line >= BETWEEN_LINES_S:
            self._print(stage.progress())


def open_display(console: Console | None = None) -> Display:
    """A live display where `console` (default: standard output) is a terminal, else plain lines."""
    console = console or Console()
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(console)
