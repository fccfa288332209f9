"""Who may write a run directory: one process at a time."""

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import filelock

from sampo_ray.errors import ConfigError, RunLostError
from sampo_ray.run.storage import Place, absolute

logger = logging.getLogger(__name__)
LEASE_S, SETTLE_S = 60.0, 1.0
Check = Callable[[], None]
"""Raises RunLostError when the run directory is another process's by now."""


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[Check]:
    """Holds the run directory for this process; ConfigError when another one has it. Yields a check to make before a
    write.

    Locally an OS lock, which ends with the process; elsewhere a lease, which is renewed and ends after LEASE_S.
    """
    place = Place(absolute(url))
    if not place.local:
        with Lease(place.at("lease.json"), url).held() as check:
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
    """A file with its owner and when that has renewed it. Storage has no locks: who wrote last has it."""

    def __init__(self, file: Place, url: str) -> None:
        self._file, self._url, self._owner = file, url, uuid.uuid4().hex
        self._renewed, self._over = 0.0, threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[Check]:
        """Takes the lease, renews it in a thread, and gives it back."""
        owner, age = self._read()
        if owner is not None and age < LEASE_S:
            raise self._in_use()
        self._write()
        time.sleep(SETTLE_S)  # another process may have found it free at the same moment
        if self._read()[0] != self._owner:
            raise self._in_use()
        thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        thread.start()
        try:
            yield self.check
        finally:
            self._over.set()
            thread.join(timeout=LEASE_S)
            if self._read()[0] == self._owner:
                self._file.remove()

    def check(self) -> None:
        """Raises RunLostError when another process has the lease; renews it first if that is overdue."""
        if time.monotonic() - self._renewed > LEASE_S:
            self._renew()

    def _renew(self) -> None:
        if self._read()[0] not in (None, self._owner):
            raise RunLostError(
                f"run.dir={self._url!r} has been taken over by another process, since this one did not renew its lease "
                f"for {LEASE_S:.0f} s; leave the run to that process"
            )
        self._write()

    def _keep_renewing(self) -> None:
        while not self._over.wait(LEASE_S / 4):
            try:
                self._renew()
            except RunLostError:
                self._renewed = -LEASE_S  # the next check raises it where it stops the run
                return
            except Exception as error:  # storage libraries raise any kind; the lease lasts for some more attempts
                logger.warning("the lease of the run directory could not be renewed: %s", type(error).__name__)

    def _read(self) -> tuple[str | None, float]:
        """Owner and age in seconds; no owner where there is no lease, or none that can be read."""
        if not self._file.exists():
            return None, 0.0
        try:
            lease = json.loads(self._file.read())
            return lease["owner"], time.time() - lease["time"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # given back just now, or cut short
            return None, 0.0

    def _write(self) -> None:
        self._file.write(json.dumps({"owner": self._owner, "time": time.time()}).encode())
        self._renewed = time.monotonic()

    def _in_use(self) -> ConfigError:
        return ConfigError(f"run.dir={self._url!r} is in use by another process (lease younger than {LEASE_S:.0f} s)")
