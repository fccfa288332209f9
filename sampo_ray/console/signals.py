"""How a command ends before its time: in order, as by Ctrl-C, whichever signal asks for it, and within a limit."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

END_S = 20.0
"""Seconds that a command has to end in order. Kubernetes gives 30 before it kills, systemd 90."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class OrderlyEnd:
    """Signal handler that raises KeyboardInterrupt, and has the kernel end the process END_S after the first signal.

    KeyboardInterrupt, because `ray.get` passes no other exception of a handler on as it is. An alarm of the kernel,
    because it needs no thread of a process that may hang. What this process has started ends with it in any case.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGINT
        """The exit status that tells of the last signal."""

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.status = 128 + number
        if not any(signal.getitimer(signal.ITIMER_REAL)):
            # For the first process of a container the kernel takes no default action.
            signal.signal(signal.SIGALRM, signal.SIG_DFL if os.getpid() != 1 else lambda *_: os._exit(self.status))
            signal.setitimer(signal.ITIMER_REAL, END_S)
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
