"""What a run is doing: a small file in its directory, for readers in other processes such as the page's live view."""

import contextlib
import threading
import time

from pydantic import BaseModel

from sampo_ray.run.storage import Place

BETWEEN_WRITES_S = 1.0
HEARTBEAT_S = 10.0
"""An unchanged status is written again after this time, so that readers can tell a slow stage from a dead run."""


class Activity(BaseModel):
    """A stage in progress for `seconds`: `done` of `total` units (None: not known), at `rate` units per second."""

    name: str
    done: int
    total: int | None
    unit: str
    seconds: float
    rate: float | None


class Status(BaseModel):
    """`round` counts from 1. It is None before the first round, as `stage` is between stages."""

    round: int | None = None
    rounds: int | None = None
    stage: Activity | None = None
    running: bool = True  # False once the process has ended, unless it was killed
    time: float = 0.0  # of writing, in seconds since 1970

    def alive(self) -> bool:
        """Whether a process works on the run, judged by the age of the file."""
        return self.running and time.time() - self.time < 3 * HEARTBEAT_S


class StatusFile:
    """Writes `status.json` of a run directory from a thread, at most once in BETWEEN_WRITES_S; the run never waits."""

    def __init__(self, run: Place) -> None:
        self._file = run.at("status.json")
        self._latest = Status()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_changes, name="status", daemon=True)
        self._thread.start()

    def update(self, status: Status) -> None:
        self._latest = status
        self._changed.set()

    def close(self) -> None:
        """Writes that the run is no longer running, and ends the thread."""
        self._latest = self._latest.model_copy(update={"stage": None, "running": False})
        self._closed.set()
        self._changed.set()
        self._thread.join(timeout=HEARTBEAT_S)

    def _write_changes(self) -> None:
        while not self._closed.is_set():
            self._changed.wait(HEARTBEAT_S)
            self._changed.clear()
            self._write()
            self._closed.wait(BETWEEN_WRITES_S)
        self._write()

    def _write(self) -> None:
        status = self._latest.model_copy(update={"time": time.time()})
        with contextlib.suppress(Exception):  # storage libraries raise any kind; no run may fail over this file
            self._file.write(status.model_dump_json().encode())


def read_status(run: Place) -> Status | None:
    """The run's status; None before it has written one."""
    file = run.at("status.json")
    return Status.model_validate_json(file.read()) if file.exists() else None
