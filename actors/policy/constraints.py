"""Tries constraints on answers (JSON schemas, choices, calls of tools) before the engine gets them.

The engine compiles them in a few threads and without a time limit, and ten characters of a pattern can keep a thread
busy for many seconds; then no request's constraints are compiled. So a copy of this process compiles each one first,
within limits.
"""

import asyncio
import contextlib
import os
import re
import resource
import select
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

CPU_S = 10  # of CPU time, so that it is the same on a busy machine
WALL_S = 120.0
MEMORY_BYTES = 1 << 30
REMEMBERED = 1024
PLACE_IN_SOURCE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # how xgrammar's messages begin

Trial = Callable[[StructuredOutputsParams], None]
"""Compiles a constraint; raises what the engine would."""


class TrialTakesTooLong(Exception):
    """A trial that used up its limits of CPU time or memory."""


class Constraints:
    """Checks constraints by a trial, one at a time, and remembers the last verdicts. `trial` is called when the first
    constraint comes.
    """

    def __init__(self, trial: Callable[[], Trial], cpu_s: int = CPU_S, wall_s: float = WALL_S) -> None:
        self._make_trial, self._cpu_s, self._wall_s = trial, cpu_s, wall_s
        self._trial: Trial | None = None
        self._verdicts: OrderedDict[int, str] = OrderedDict()
        self._lock = asyncio.Lock()

    async def check(self, constraint: StructuredOutputsParams) -> None:
        """Raises VLLMValidationError for a constraint that the engine cannot compile, or that takes it too long.

        A trial that did not end in time says nothing of the constraint, and is not remembered.
        """
        key = hash(repr(constraint))
        if (reason := self._verdicts.get(key)) is None:
            async with self._lock:  # another request may have brought the same one meanwhile
                reason = self._verdicts.get(key)
                if reason is None:
                    reason = await asyncio.to_thread(self._verdict, constraint)
        self._verdicts[key] = reason
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if reason:
            raise refused(reason)

    def _verdict(self, constraint: StructuredOutputsParams) -> str:
        self._trial = trial = self._trial or self._make_trial()
        try:
            return PLACE_IN_SOURCE.sub("", in_a_copy(lambda: trial(constraint), self._cpu_s, self._wall_s)).strip()
        except TimeoutError:
            raise refused(f"were not tried within {self._wall_s:.0f} s; ask again") from None
        except TrialTakesTooLong:
            return f"take more than {self._cpu_s} s to compile; use fewer patterns and lower bounds of lengths"


def refused(reason: str) -> VLLMValidationError:
    return VLLMValidationError(f"the answer's JSON schema, choices or tools: {reason}")


def in_a_copy(work: Callable[[], object], cpu_s: int, wall_s: float = WALL_S) -> str:
    """Does work in a forked copy of this process; returns the message of the exception that it raised, else "".

    The copy has this thread alone, so the work must need no other, nor a lock that another may hold. TrialTakesTooLong
    when it has used up `cpu_s` or MEMORY_BYTES; TimeoutError after `wall_s`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _work_and_end(work, writer, cpu_s)
    os.close(writer)
    said = b""
    try:
        with open(reader, "rb") as pipe:
            ready = select.poll()  # unlike select, it takes any number of a file
            ready.register(pipe, select.POLLIN | select.POLLHUP)
            if not ready.poll(1000 * wall_s):
                raise TimeoutError
            said = pipe.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not said:
        raise TrialTakesTooLong()
    return said.decode(errors="replace")[1:]


def _work_and_end(work: Callable[[], object], writer: int, cpu_s: int) -> NoReturn:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        with contextlib.suppress(MemoryError):
            os.write(writer, f"+{_error_of(work)}".encode()[:2000])
    finally:
        os._exit(0)


def _error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except MemoryError:
        raise
    except Exception as error:
        return Exception.__str__(error) or type(error).__name__  # vLLM's __str__ adds the value
    return ""
