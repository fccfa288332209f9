"""Who may write a run directory: one process at a time."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import filelock

from sampo_ray.errors import ConfigError, RunLostError
from sampo_ray.run.claims import Claims
from sampo_ray.run.reach import explained
from sampo_ray.run.storage import Place, absolute

logger = logging.getLogger(__name__)
LEASE_S = 90.0
RENEWALS, LATEST = 9, 7
"""A lease is renewed nine times in LEASE_S; a run stops when seven times have passed without."""
Check = Callable[[], None]
"""Raises RunLostError when the run directory is another process's by now."""


@contextlib.contextmanager
def exclusive(url: str, note: Callable[[str], None] = logger.info) -> Iterator[Check]:
    """Holds the run directory for this process; ConfigError when another one has it. Yields a check to make before a
    write. `note` is told of what is waited for.

    Locally an OS lock, which ends with the process; elsewhere a lease, which is renewed, and ends LEASE_S after its
    process does.
    """
    place = Place(absolute(url))
    if not place.local:
        with Lease(place.at("lease"), url).held(note) as check:
            yield check
        return
    os.makedirs(place.path, exist_ok=True)
    lock = filelock.FileLock(place.at("lock").path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"run.dir={url!r} is in use by another process; wait for it or stop it") from None
    try:
        yield lambda: None
    finally:
        lock.release()


class Lease:
    """Claims on a run directory that are renewed in a thread. When they cannot be for too long, the main thread is
    interrupted, before another process can take the lease."""

    def __init__(self, folder: Place, url: str) -> None:
        self._claims, self._url = Claims(folder, LEASE_S), url
        self._stop_s, self._lost, self._holder = LEASE_S * LATEST / RENEWALS, "", threading.current_thread()
        self._renewing, self._over = threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def held(self, note: Callable[[str], None]) -> Iterator[Check]:
        """Takes the lease, renews it, and gives it back."""
        with explained(self._url):
            taken = self._claims.take(lambda text: note(f"run.dir={self._url!r}: {text}"))
        if not taken:
            raise ConfigError(f"run.dir={self._url!r} is in use by another process, which renews its lease; stop it")
        if not self._claims.exclusive:
            note(f"run.dir={self._url!r}: this storage has no conditional writes; begin no two runs there at once")
        for work in (self._keep_renewing, self._watch):
            threading.Thread(target=work, name="lease", daemon=True).start()
        try:
            yield self.check
        except KeyboardInterrupt:
            self._raise_if_lost()
            raise
        finally:
            self._over.set()
            if not self._lost and self._renewing.acquire(timeout=LEASE_S):
                try:
                    self._claims.give_back()
                except Exception as error:  # storage libraries raise any kind; the lease ends by itself
                    logger.warning("the lease of the run directory was not given back: %r", error)
                finally:
                    self._renewing.release()

    def check(self) -> None:
        """Raises RunLostError when another process has the lease, or may have; renews it first if that is overdue."""
        if self._claims.age > self._stop_s and not self._lost:
            self._renew()
        self._raise_if_lost()

    def _keep_renewing(self) -> None:
        while not self._over.wait(LEASE_S / RENEWALS) and not self._lost:
            try:
                self._renew()
            except Exception as error:  # storage libraries raise any kind; the lease lasts for some more attempts
                logger.warning("the lease of the run directory could not be renewed: %r", error)

    def _renew(self) -> None:
        with self._renewing:
            if not self._over.is_set() and not self._claims.renew():
                self._lose("has been taken over by another process; leave the run to that process")

    def _watch(self) -> None:
        """Counts steps of its own since the last renewal: one that was stopped meanwhile may still renew the lease."""
        last, ticks, tick_s = self._claims.number, 0, LEASE_S / (10 * RENEWALS)
        while not self._over.wait(tick_s) and not self._lost:
            ticks = ticks + 1 if self._claims.number == last else 0
            last = self._claims.number
            if ticks >= 10 * LATEST:
                self._lose(f"has not been reached for {self._stop_s:.0f} s; resume the run once it can be")

    def _lose(self, why: str) -> None:
        """Interrupts the main thread, if the run is there, wherever it waits; else the next check ends the run."""
        self._lost = f"run.dir={self._url!r} {why}"
        # A script's background jobs start with SIGINT ignored, but hear SIGTERM.
        heard = [each for each in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(each))]
        if self._holder is threading.main_thread() and heard and self._holder.ident is not None:
            signal.pthread_kill(self._holder.ident, heard[0])

    def _raise_if_lost(self) -> None:
        if self._lost:
            raise RunLostError(self._lost) from None
