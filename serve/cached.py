"""A value that is read at most once in a while, for all callers together."""

import asyncio
import contextvars
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class CachedRead(Generic[Value]):
    """The result of `read`, which is called when somebody asks and the last read ended `max_age_s` ago.

    One read at a time serves all callers, and goes on when one is cancelled. The error of a read that fails is raised
    to all who ask until the next read. `last` stays the last good value, for callers that prefer it.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Value]],
        max_age_s: float,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._max_age_s, self._timeout_s, self._clock = read, max_age_s, timeout_s, clock
        self.last: Value | None = None
        self._error: Exception | None = None
        self._started = self._ended = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def get(self) -> Value:
        """Raises what the read raised, and TimeoutError `timeout_s` after it began; no second one is started then."""
        if self._reading is None and self._clock() - self._ended >= self._max_age_s:
            self._started = self._clock()
            # An empty context: Ray cancels what a request has called when the request is cancelled.
            self._reading = asyncio.create_task(self._refresh(), context=contextvars.Context())
        if (reading := self._reading) is not None:
            await asyncio.wait({reading}, timeout=max(0.0, self._started + self._timeout_s - self._clock()))
            if not reading.done():
                raise TimeoutError
        if self._error is not None:
            raise self._error
        return self.last  # type: ignore[return-value]

    def set(self, value: Value) -> None:
        """Takes `value` as if it had just been read. What a read under way finds is older, and left alone."""
        self._reading = None
        self._take(value, None)

    def _take(self, value: Value | None, error: Exception | None) -> None:
        self.last, self._error, self._ended = value, error, self._clock()

    async def _refresh(self) -> None:
        reading = asyncio.current_task()
        try:
            value, error = await self._outcome()
            if self._reading is reading:
                self._take(value, error)
        finally:
            if self._reading is reading:
                self._reading = None

    async def _outcome(self) -> tuple[Value | None, Exception | None]:
        try:
            return await self._read(), None
        except Exception as error:
            return self.last, error
