"""A lease on storage that has no locks but creates a file for one of several processes only."""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sampo_ray.run.storage import Place

LOOK_S = 1.0
MARGIN_S = 2.0
"""Storage tells when a file was written to the second."""
SETTLE_S = 1.0
_CLAIM = re.compile(r"[0-9]{12}\.json")


class Clock(Protocol):
    """The functions of `time` that a lease needs."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Claim:
    """A claim by its number; without an owner it says that the lease is free."""

    number: int = 0
    owner: str | None = None


class Claims:
    """A lease as numbered files in `folder`: who created the newest has it, for `lasts_s` from then on, and renews it
    by creating the next. Only one process can create a number, so that only one can follow on the newest.

    A claim is never older than its owner thinks that it is, and others wait until it is `lasts_s` old: by the storage's
    clock, or where that tells no times by their own, from when they first saw it. No two clocks are compared.
    """

    def __init__(self, folder: Place, lasts_s: float, clock: Clock = time) -> None:
        self._folder, self._lasts_s, self._clock = folder, lasts_s, clock
        self._owner = uuid.uuid4().hex
        self.number = 0
        self.renewed = -lasts_s
        """When the last claim was begun, by `clock`."""
        self.exclusive = True
        """Whether the storage refuses to create what is there. Where it does not, two processes that take the lease
        within SETTLE_S of each other both may have it."""

    @property
    def age(self) -> float:
        """Seconds since it was taken or renewed."""
        return self._clock.monotonic() - self.renewed

    def take(self, note: Callable[[str], None]) -> bool:
        """Takes the lease, if need be once that of another process has ended, which is noted; False when that process
        renews it."""
        self.exclusive, age = self._probed()
        found: Claim | None = self._newest()
        if found is not None and found.owner is not None:
            found = self._outlived(found, age, note)
        return found is not None and self._create(found.number + 1, self._owner)

    def renew(self) -> bool:
        """Renews the lease; also one that has ended, if nobody has taken it. False: somebody has."""
        return self._create(self.number + 1, self._owner)

    def give_back(self) -> None:
        """Lets the next process take the lease at once; no matter if one has."""
        self._create(self.number + 1, None)

    def _create(self, number: int, owner: str | None) -> bool:
        begun, file = self._clock.monotonic(), self._file(number)
        content = json.dumps({"owner": owner, "by": self._owner}).encode()
        if not file.create(content):
            return False
        if not self.exclusive:
            self._clock.sleep(SETTLE_S)
            if file.read() != content:
                return False
        numbers = self._numbers()
        if max(numbers, default=0) > number:  # it had been created, followed and removed since this process looked
            file.remove()
            return False
        self.number, self.renewed = number, begun
        for old in numbers:
            if old < number:
                with contextlib.suppress(Exception):  # storage libraries raise any kind; the next claim removes it
                    self._file(old).remove()
        return True

    def _outlived(self, found: Claim, age: float | None, note: Callable[[str], None]) -> Claim | None:
        """The claim to follow once the lease is free; None when another process has renewed or taken it."""
        left = self._lasts_s + MARGIN_S - (age or 0.0)
        if left > 0:
            note(
                f"another process had it less than {self._lasts_s:.0f} s ago; waiting up to {left:.0f} s for it to end"
            )
        until = self._clock.monotonic() + left
        while self._clock.monotonic() < until:
            self._clock.sleep(LOOK_S)
            newest = self._newest()
            if newest.number != found.number:
                return newest if newest.owner is None else None
        return found

    def _probed(self) -> tuple[bool, float | None]:
        """Whether the storage creates files exclusively, and the seconds since the newest claim, by its clock."""
        probe, numbers = self._folder.at(f"asks-{self._owner}"), self._numbers()
        try:
            exclusive = probe.create(b"a") and not probe.create(b"b")
            now, then = probe.modified(), self._file(max(numbers)).modified() if numbers else None
        except FileNotFoundError:  # renewed meanwhile
            return True, None
        finally:
            probe.remove()
        return exclusive, (now - then).total_seconds() if now and then else None

    def _newest(self) -> Claim:
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError):  # followed, and removed, meanwhile
                content = self._file(max(numbers)).read()
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return Claim(max(numbers), json.loads(content)["owner"])
                return Claim(max(numbers), "unknown")
        return Claim()

    def _numbers(self) -> list[int]:
        return [int(name.partition(".")[0]) for name in self._folder.names() if _CLAIM.fullmatch(name)]

    def _file(self, number: int) -> Place:
        return self._folder.at(f"{number:012d}.json")
