"""One driver at a time for a run directory."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator

import filelock

from sampo_ray.errors import ConfigError
from sampo_ray.run.storage import Place, absolute

LEASE_S = 60


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Holds the run directory for this process; ConfigError when another one has it.

    Locally an OS lock, which ends with the process; elsewhere a lease, which is renewed and ends after LEASE_S.
    """
    place = Place(absolute(url))
    if place.local:
        os.makedirs(place.path, exist_ok=True)
        lock = filelock.FileLock(place.at("lock").path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(f"run.dir={url!r} is in use by another process; wait for it or stop it") from None
        with lock:
            yield
        return
    lease, owner, stop = place.at("lease.json"), uuid.uuid4().hex, threading.Event()
    if lease.exists() and time.time() - json.loads(lease.read())["time"] < LEASE_S:
        raise ConfigError(f"run.dir={url!r} is in use by another process (lease younger than {LEASE_S} s)")

    def renew() -> None:
        while True:
            lease.write(json.dumps({"owner": owner, "time": time.time()}).encode())
            if stop.wait(LEASE_S / 4):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=LEASE_S)
        lease.remove()
