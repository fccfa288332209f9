"""Processes that end with the one that started them, by a private interface of multiprocessing (checked with CPython
3.11 and 3.12) and prctl(2) of Linux.

An engine's processes are not Ray's, and vLLM 0.29 tells an engine of the end of its client in no way: without this, an
engine goes on when its replica is killed in one of the moments in which Ray cannot kill the replica's children as well.
"""

import ctypes
import os
import signal
from multiprocessing import context
from typing import Any

PR_SET_PDEATHSIG = 1


class BoundProcess(context.SpawnProcess):
    """A spawned process that the kernel ends with its parent, and so with it all that it spawns itself.

    What a spawned process reads first is its pickled Process. The reconstructor is called before the rest is read, so
    that the process is bound before it imports what its target needs, which takes an engine ten seconds or more.

    The kernel regards the thread that started the process as its parent, so that thread must last as long as the
    process should.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound, (os.getpid(),), vars(self)


def bind_spawned_processes() -> None:
    """Has every process that this one spawns from now on end with it. Sets `multiprocessing`'s class of processes."""
    context.SpawnContext.Process = BoundProcess


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however it ends; at once if it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def _bound(parent: int) -> BoundProcess:
    end_with(parent)
    bind_spawned_processes()
    return BoundProcess.__new__(BoundProcess)
