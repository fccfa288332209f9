"""How a command ends before its time: in order, as by Ctrl-C, whichever signal asks for it, and within a limit."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

END_S = 20.0
"""Seconds that a command has to end in order. Kubernetes gives 30 before it kills, systemd 90."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class OrderlyEnd:
    """Signal handler that raises KeyboardInterrupt, and ends the process END_S after the first signal.

    KeyboardInterrupt, because `ray.get` passes no other exception of a handler on as it is. A Ray that this process has
    started ends with it in any case, and so do Ray's processes and those of the engines.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGINT
        """The exit status that tells of the last signal."""
        self._limit: threading.Timer | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.status = 128 + number
        if self._limit is None:
            self._limit = threading.Timer(END_S, os._exit, [self.status])
            self._limit.daemon = True
            self._limit.start()
        raise KeyboardInterrupt


@contextlib.contextmanager
def orderly_end() -> Iterator[OrderlyEnd]:
    """Within, SIGNALS end the command in order. One that the process was started to ignore (nohup) stays ignored."""
    end = OrderlyEnd()
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each in SIGNALS:
        if before[each] is not signal.SIG_IGN:
            signal.signal(each, end)
    try:
        yield end
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
