"""Work of the weight store that is done again until what is there is what is wanted."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import ray
from ray import ObjectRef

from sampo_ray.errors import FleetError, UserError
from sampo_ray.run.report import Trouble

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

SOON_S = 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


def pause_s(tries: int) -> float:
    """The pause after so many failures in a row."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tries - 1, 30))


class Duty:
    """A `step` that compares what is wanted with what is there and mends the difference; one at a time, for ever.

    It returns whether there is none left; else the next step comes soon. It also comes after `every_s` and when it is
    woken. What a step raises is the duty's `trouble` until one finds no difference; the pauses between failures grow.
    """

    def __init__(self, what: str, step: Callable[[], Awaitable[bool]], every_s: float) -> None:
        self.trouble: Trouble | None = None
        self._what, self._step, self._every_s = what, step, every_s
        self._begun = self._ended = 0
        self._wake, self._over = asyncio.Event(), asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the steps in this event loop, if that has not been done."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def wake(self) -> None:
        self._wake.set()

    async def stepped(self, timeout_s: float) -> None:
        """Waits until a step that begins after this call has ended, well or not, and no longer than `timeout_s`."""
        wanted = self._begun + 1
        self.start()
        self.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._over:
                await self._over.wait_for(lambda: self._ended >= wanted)

    async def first_step(self, timeout_s: float) -> None:
        """Waits until any step has ended."""
        if not self._ended:
            await self.stepped(timeout_s)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._begun += 1
            pause = await self._try()
            async with self._over:
                self._ended = self._begun
                self._over.notify_all()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _try(self) -> float:
        """One step; returns the seconds until the next."""
        try:
            content = await self._step()
        except Exception as error:  # of whatever kind: it is shown, and the next step does not depend on this one
            self.trouble = self._after(error)
            return pause_s(self.trouble.tries)
        if content and self.trouble is not None:
            logger.info("%s: well again after %d failures", self._what, self.trouble.tries)
            self.trouble = None
        return self._every_s if content else min(SOON_S, self._every_s)

    def _after(self, error: Exception) -> Trouble:
        before, reason, now = self.trouble, reason_of(error), time.time()
        if before is None or before.reason != reason:
            logger.warning("%s: %s; it is tried again until it succeeds", self._what, reason)
        tries, since = (before.tries + 1, before.since) if before else (1, now)
        return Trouble(what=self._what, reason=reason, since=since, last=now, tries=tries)


def reason_of(error: Exception) -> str:
    """One line that says what happened, of a remote call what happened there."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    if not isinstance(cause, UserError):
        text = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    return text[:300]


async def result_within(call: "ObjectRef[Result]", limit_s: float) -> Result:
    """The result of a task, which is ended after `limit_s` (FleetError)."""
    try:
        return await asyncio.wait_for(call, limit_s)
    except TimeoutError:
        ray.cancel(call, force=True)
        raise FleetError(f"it took longer than {limit_s:.0f} s") from None
