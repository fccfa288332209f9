"""What the user sees of a run: one live display on a terminal, plain lines everywhere else.

The loop only says what happens (`round`, `stage`, `metrics`, `version`, `note`); nothing here knows of Ray.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from sampo_ray.run.status import Activity, Status, StatusFile
from sampo_ray.run.steps import StepMetrics
from sampo_ray.run.storage import Place

BETWEEN_LINES_S = 5.0
"""Plain output: a running stage says no more than one line in this time."""

SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "margin": ("margin", "{:+.4f}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "chosen_tokens": ("chosen", "{:.0f} tok"),
    "rejected_tokens": ("rejected", "{:.0f} tok"),
}
"""Which of a step's metrics are shown, under which name and how; the rest are for the trackers."""


@dataclass
class Stage:
    """The progress of one stage of a round. Elapsed times are seconds since its start and come from the display."""

    name: str
    total: int | None
    unit: str
    started: float
    advanced: Callable[["Stage"], None]
    done: int = 0

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        self.advanced(self)

    def amount(self) -> str:
        return f"{self.done:,} {self.unit}" if self.total is None else f"{self.done:,}/{self.total:,} {self.unit}"

    def activity(self, elapsed: float) -> Activity:
        rate = self.done / elapsed if self.done and elapsed > 0 else None
        return Activity(name=self.name, done=self.done, total=self.total, unit=self.unit, seconds=elapsed, rate=rate)

    def rate(self, elapsed: float) -> str:
        """Units per second, or seconds per unit where that reads better; empty while unknown."""
        if not self.done or elapsed <= 0:
            return ""
        rate = self.done / elapsed
        if rate >= 10:
            return f"{rate:,.0f}/s"
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"

    def left(self, elapsed: float) -> str:
        """Time left at the present pace; empty while unknown and at the end."""
        if self.total is None or not self.done or self.done >= self.total:
            return ""
        return f"{duration(elapsed / self.done * (self.total - self.done))} left"

    def progress(self, elapsed: float) -> str:
        facts = self.amount(), self.rate(elapsed), self.left(elapsed)
        return f"{self.name}: " + ", ".join(fact for fact in facts if fact)

    def result(self, elapsed: float) -> str:
        """What is left to say at the end; names both numbers where units are missing."""
        if not self.done and self.total is None:
            return f"{self.name}: {duration(elapsed)}"
        amount = f"{self.done:,} {self.unit}" if self.done == self.total else self.amount()
        rate = self.rate(elapsed)
        return f"{self.name}: {amount} in {duration(elapsed)}" + (f", {rate}" if rate else "")


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
    """Progress of a run, on a terminal or in a pipe. `open_display` picks; use it as a context manager."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self._round = ""
        self._status: dict[str, str] = {}
        self._news = False
        self._file: StatusFile | None = None
        self._told = Status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()

    def begin_run(self, run: Place) -> None:
        """From now on what happens belongs to this run, and its directory is told."""
        if self._file:
            self._file.close()
        self._file, self._told = StatusFile(run), Status()

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Stage]:
        """A stage of `total` units (None: not known), such as `stage("generate", 64, "prompts")`."""

        def advanced(stage: Stage) -> None:
            self._advanced(stage)
            self._tell(stage=stage.activity(self._elapsed(stage)))

        stage = Stage(name, total, unit, self.clock(), advanced)
        self._begun(stage)
        self._tell(stage=stage.activity(0.0))
        try:
            yield stage
        finally:
            self._ended(stage)
            self._tell(stage=None)

    @abstractmethod
    def _begun(self, stage: Stage) -> None: ...

    @abstractmethod
    def _advanced(self, stage: Stage) -> None: ...

    @abstractmethod
    def _ended(self, stage: Stage) -> None: ...

    def begin_round(self, index: int, count: int) -> None:
        """Round `index` (from 0) of `count` begins."""
        self._round = f"round {index + 1}/{count}"
        self._tell(round=index + 1, rounds=count)

    def metrics(self, step: StepMetrics) -> None:
        """One optimizer step's metrics; those in `SHOWN` appear."""
        values = step.values
        if values.get("skipped"):
            self.note(f"step {step.step} was skipped: {values['reason']}")
        self._update({name: form.format(values[metric]) for metric, (name, form) in SHOWN.items() if metric in values})

    def version(self, number: int) -> None:
        """Policy version `number` is live."""
        self._update({"policy": f"v{number}"})

    def note(self, text: str) -> None:
        """One line that stays: something the user should know."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Something new begins, such as another run: what was shown of the last one goes."""
        self._round, self._status, self._news = "", {}, False
        self.note(f"--- {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table that stays, such as the summary of a run; the first column names the rows."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for position, column in enumerate(columns):
            table.add_column(column, justify="right" if position else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def _tell(self, **changes: object) -> None:
        if self._file:
            self._told = self._told.model_copy(update=changes)
            self._file.update(self._told)

    def _update(self, facts: dict[str, str]) -> None:
        self._status.update(facts)
        self._news = True

    def _elapsed(self, stage: Stage) -> float:
        return self.clock() - stage.started

    def _say(self, line: str) -> None:
        """A line about a stage, after the round it belongs to and with the facts that are new since the last one."""
        facts, self._news = (self._facts() if self._news else ""), False
        self.note("  ".join(filter(None, (self._round, line, facts))))

    def _facts(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._status.items())


class LiveDisplay(Display):
    """At the foot of the terminal a status line and a bar for each running stage; ended stages leave a line above."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._running: dict[TaskID, Stage] = {}
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[rate]}", style="cyan", markup=False),
            TextColumn("{task.fields[left]}", style="magenta", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        super().__exit__(*exception)

    def _begun(self, stage: Stage) -> None:
        task = self._bars.add_task(stage.name, total=stage.total, amount=stage.amount(), rate="", left="")
        self._running[task] = stage

    def _advanced(self, stage: Stage) -> None:
        """The next refresh shows it."""

    def _ended(self, stage: Stage) -> None:
        for task in [task for task, running in self._running.items() if running is stage]:
            del self._running[task]
            self._bars.remove_task(task)
        self._say(stage.result(self._elapsed(stage)))

    def _render(self) -> RenderableType:
        for task, stage in list(self._running.items()):
            elapsed = self._elapsed(stage)
            rate, left = stage.rate(elapsed), stage.left(elapsed)
            self._bars.update(task, completed=stage.done, amount=stage.amount(), rate=rate, left=left)
        return Group(
            Text(
                "  ".join(filter(None, (self._round, self._facts()))), style="bold", no_wrap=True, overflow="ellipsis"
            ),
            self._bars,
        )


class PlainDisplay(Display):
    """Lines for logs and pipes: one when a stage begins and ends, and while it runs at most one every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        console.width = 160  # a pipe has no width of its own, and rich would cut tables to 80 columns
        self._last_line = clock()

    def note(self, text: str) -> None:
        self._last_line = self.clock()
        super().note(text)

    def _begun(self, stage: Stage) -> None:
        of = "" if stage.total is None else f": {stage.total:,} {stage.unit}"
        self._say(f"{stage.name} begins{of}")

    def _advanced(self, stage: Stage) -> None:
        if stage.done != stage.total and self.clock() - self._last_line >= BETWEEN_LINES_S:
            self._say(stage.progress(self._elapsed(stage)))

    def _ended(self, stage: Stage) -> None:
        self._say(stage.result(self._elapsed(stage)))


def open_display(console: Console | None = None) -> Display:
    """A live display where `console` (default: standard output) is a terminal, else plain lines."""
    console = console or Console()
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(console)
