"""What a run is doing now: a small file in its directory, for readers in other processes (the page's live view)."""

import contextlib
import threading
import time

from pydantic import BaseModel

from sampo_ray.run.storage import Place

BETWEEN_WRITES_S = 1.0
HEARTBEAT_S = 10.0
"""Without news the file is written again after this time, so that a reader can tell a slow stage from a dead run."""


class Activity(BaseModel):
    """A stage in progress for `seconds`: `done` of `total` units (None: not known), at `rate` units per second."""

    name: str
    done: int
    total: int | None
    unit: str
    seconds: float
    rate: float | None


class Status(BaseModel):
    """`round` counts from 1; None, like `stage`, where there is none just now. `time` is seconds since 1970."""

    round: int | None = None
    rounds: int | None = None
    stage: Activity | None = None
    running: bool = True
    """Whether its process goes on; one that was killed has had no time to say."""
    time: float = 0.0

    def alive(self) -> bool:
        """Whether a process works on the run, as far as its heartbeat tells."""
        return self.running and time.time() - self.time < 3 * HEARTBEAT_S


class StatusFile:
    """Keeps `status.json` of a run directory up to date from a thread of its own, which never holds up the run.

    It is replaced atomically, at most once in BETWEEN_WRITES_S.
    """

    def __init__(self, run: Place) -> None:
        self._file = run.at("status.json")
        self._latest = Status()
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)
        self._thread.start()

    def tell(self, status: Status) -> None:
        self._latest = status
        self._news.set()

    def close(self) -> None:
        """The last thing it says is that nothing runs any more."""
        self._latest = self._latest.model_copy(update={"stage": None, "running": False})
        self._closed.set()
        self._news.set()
        self._thread.join(timeout=HEARTBEAT_S)

    def _keep(self) -> None:
        while not self._closed.is_set():
            self._news.wait(HEARTBEAT_S)
            self._news.clear()
            self._write()
            self._closed.wait(BETWEEN_WRITES_S)
        self._write()

    def _write(self) -> None:
        status = self._latest.model_copy(update={"time": time.time()})
        with contextlib.suppress(Exception):  # of whatever kind the store's library raises: no run dies of this file
            self._file.write(status.model_dump_json().encode())


def read_status(run: Place) -> Status | None:
    """None: the run has said nothing yet."""
    file = run.at("status.json")
    return Status.model_validate_json(file.read()) if file.exists() else None
