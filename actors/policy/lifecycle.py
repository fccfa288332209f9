"""The life of a policy replica as a pure function of its events, and the gate that its requests pass."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum


class ReplicaState(StrEnum):
    STARTING = "starting"
    """Its engine is not up yet."""
    STALE = "stale"
    """The engine is up, but holds other weights than those to serve. It answers no requests."""
    LOADING = "loading"
    """Weights are being replaced; requests in flight are paused."""
    READY = "ready"
    """It serves the weights that it has, also while newer ones are on their way."""
    DRAINING = "draining"
    """It takes no new requests and finishes those it has."""
    DEAD = "dead"
    """Its process is ending; Serve starts another replica."""


class ReplicaEvent(StrEnum):
    ENGINE_UP = "engine up"
    LOAD = "load"
    LOADED = "loaded"
    DRAIN = "drain"
    FAIL = "fail"


_NEXT = {
    (ReplicaState.STARTING, ReplicaEvent.ENGINE_UP): ReplicaState.STALE,
    (ReplicaState.STALE, ReplicaEvent.LOAD): ReplicaState.LOADING,
    (ReplicaState.LOADING, ReplicaEvent.LOADED): ReplicaState.READY,
    (ReplicaState.READY, ReplicaEvent.LOAD): ReplicaState.LOADING,
    (ReplicaState.STALE, ReplicaEvent.DRAIN): ReplicaState.DRAINING,
    (ReplicaState.READY, ReplicaEvent.DRAIN): ReplicaState.DRAINING,
    **{(state, ReplicaEvent.FAIL): ReplicaState.DEAD for state in ReplicaState},
}


def next_state(state: ReplicaState, event: ReplicaEvent) -> ReplicaState:
    """The state that follows. ValueError for a transition that does not exist.

    Transitions that do not exist, and why:

    * `stale` to `ready` without `loading`: the replica would answer with the weights that it was built from.
    * `loading` to `ready` or `stale` other than by `loaded`: an engine whose update failed half-way holds a mixture of
      weights and must die.
    * `loading` to `draining`: it needs weights to finish its requests with.
    * out of `draining` or `dead`: Serve sends it no more requests, and a new replica is easier to trust.
    """
    try:
        return _NEXT[state, event]
    except KeyError:
        raise ValueError(f"a replica that is {state} cannot go on with {event!r}") from None


class RequestGate:
    """Lets a swap wait until no request is in flight (`serve.swap: wait`), so that each answer has one version.

    For one event loop.
    """

    def __init__(self) -> None:
        self._in_flight = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around a request, from before it reads which weights it begins with. Waits until no swap waits or runs."""
        while not self._open.is_set():
            await self._open.wait()
        self._in_flight += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Around a swap: begins once no request is in flight. Stays closed after a failure, because half-loaded weights
        must not answer.
        """
        self._open.clear()
        await self._empty.wait()
        yield
        self._open.set()
