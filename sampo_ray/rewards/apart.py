"""Functions that run in a process of their own, with a limit on their time: a regular expression of Python's holds the
interpreter until it is found, so that no thread could end it, nor the call that waits for it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

CPU_S = 3
"""Of a request: seconds of computing, so that a busy machine changes no result."""
WALL_S = 60.0
"""Until a process has started and answered."""


class EndedError(Exception):
    """The process ended without an answer, since it took longer than it may."""


class Apart:
    """A module with `answer_requests` as a function from JSON to JSON. Its process starts with the first call, ends
    with this one, and is replaced when a request ended it. Calls from several threads follow each other."""

    def __init__(self, module: str) -> None:
        self._module, self._lock = module, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, request: object) -> Any:
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], WALL_S)
                line = process.stdout.readline() if ready else b""
            except BrokenPipeError:
                line = b""
            if not line:
                self._stop(process)
                raise EndedError
            return json.loads(line)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-m", self._module]
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._process

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait(WALL_S)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._process = None


def answer_requests(function: Callable[[Any], object], prepare: Callable[[], object]) -> None:
    """Answers a line of JSON after the other until there are no more. A request that computes for longer than CPU_S
    ends the process: the signal's default action needs no interpreter. `prepare` comes before, without a limit."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    prepare()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
        result = function(json.loads(line))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        answers.write(json.dumps(result) + "\n")
        answers.flush()
