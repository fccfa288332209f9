"""The life of a policy replica as a pure function: which state follows which, and on what event. And its door."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import StrEnum


class State(StrEnum):
    STARTING = "starting"
    """Its engine is not up yet."""
    STALE = "stale"
    """The engine is up, but holds other weights than those it is to serve: it answers nobody."""
    LOADING = "loading"
    """Weights are being replaced; requests in flight are paused."""
    READY = "ready"
    """It serves. Newer weights may be on their way to it; until they are here, it serves those it has."""
    DRAINING = "draining"
    """It takes no new requests and ends those it has."""
    DEAD = "dead"
    """Its process is ending; Serve starts another replica."""


class Event(StrEnum):
    ENGINE_UP = "engine up"
    LOAD = "load"
    LOADED = "loaded"
    DRAIN = "drain"
    FAIL = "fail"


_AFTER = {
    (State.STARTING, Event.ENGINE_UP): State.STALE,
    (State.STALE, Event.LOAD): State.LOADING,
    (State.LOADING, Event.LOADED): State.READY,
    (State.READY, Event.LOAD): State.LOADING,
    (State.STALE, Event.DRAIN): State.DRAINING,
    (State.READY, Event.DRAIN): State.DRAINING,
    **{(state, Event.FAIL): State.DEAD for state in State},
}


def after(state: State, event: Event) -> State:
    """The state that follows. ValueError for a transition that does not exist.

    What does not exist, and why: from `stale` to `ready` without `loading`, or a replica would answer with the weights
    it was built from; from `loading` back to `ready` or `stale` other than by having loaded, since an engine whose
    update failed half-way holds a mixture and must die; from `loading` to `draining`, since it must first hold weights
    to end its requests with; and out of `draining` or `dead`, since a replica that Serve gave up gets no requests, and
    a new one is cheaper to trust.
    """
    try:
        return _AFTER[state, event]
    except KeyError:
        raise ValueError(f"a replica that is {state} cannot go on with {event!r}") from None


class Door:
    """Lets a swap wait until nobody is answered (`serve.swap: wait`), so that an answer has one version. On one event
    loop.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def inside(self) -> AsyncGenerator[None, None]:
        """Around an answer, from before it looks at what weights it begins with; waits while a swap does or is made."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncGenerator[None, None]:
        """Around a swap: begins once nobody is inside. After a failure it stays closed, since nobody may be answered
        with half-loaded weights.
        """
        self._open.clear()
        await self._empty.wait()
        yield
        self._open.set()
