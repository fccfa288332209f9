"""The life of a policy replica: its states, a pure function of its events, its requests in flight, and its end."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import StrEnum
from typing import NoReturn

from sampo_ray.actors.policy.messages import VersionSpan
from sampo_ray.errors import PausedError
from sampo_ray.internals.vllm import RequestProgress

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files


class ReplicaState(StrEnum):
    STARTING = "starting"  # its engine is not up yet
    STALE = "stale"  # the engine is up, but holds other weights than those to serve; it answers no requests
    ASLEEP = "asleep"  # its engine has left the GPUs to the training ranks; it answers no requests
    LOADING = "loading"  # weights are being replaced; requests in flight are paused
    READY = "ready"  # it serves the weights that it has, also while newer ones are on their way
    DEAD = "dead"  # its process is ending: it failed, or Serve stops it, which lets requests in flight end before


class ReplicaEvent(StrEnum):
    ENGINE_UP = "engine up"
    LOAD, LOADED = "load", "loaded"
    SLEEP, WAKE = "sleep", "wake"
    END = "end"


_NEXT = {
    (ReplicaState.STARTING, ReplicaEvent.ENGINE_UP): ReplicaState.STALE,
    (ReplicaState.STALE, ReplicaEvent.LOAD): ReplicaState.LOADING,
    (ReplicaState.LOADING, ReplicaEvent.LOADED): ReplicaState.READY,
    (ReplicaState.READY, ReplicaEvent.LOAD): ReplicaState.LOADING,
    (ReplicaState.READY, ReplicaEvent.SLEEP): ReplicaState.ASLEEP,
    (ReplicaState.ASLEEP, ReplicaEvent.WAKE): ReplicaState.READY,
    **{(state, ReplicaEvent.END): ReplicaState.DEAD for state in ReplicaState},
}


def next_state(state: ReplicaState, event: ReplicaEvent) -> ReplicaState:
    """The state that follows. ValueError for a transition that does not exist:

    * `stale` to `ready` without `loading`: the replica would answer with the weights that it was built from.
    * `loading` to `ready` or `stale` other than by `loaded`: an engine whose update failed half-way holds a mixture of
      weights and must die.
    * `asleep` to `loading`: a sleeping engine has no memory to load weights into.
    * out of `dead`: Serve sends it no more requests, and a new replica is easier to trust.

    Any replica can end, also one that starts or loads.
    """
    if (following := _NEXT.get((state, event))) is None:
        raise ValueError(f"a replica that is {state} cannot go on with {event!r}")
    return following


class RequestGate:
    """Lets a swap wait until no request is in flight (`serve.swap: wait`), so that each answer has one version; and
    keeps requests from an engine that sleeps.
    """

    def __init__(self) -> None:
        self._in_flight, self._paused = 0, False
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def request(self, waits: bool = True) -> AsyncIterator[None]:
        """Around a request, from before it reads which weights it begins with. Waits until no swap waits or runs, and
        for the end of a pause; a request that never `waits` so long gets a PausedError."""
        while not self._open.is_set():
            if not waits:
                self.refuse_in_pause()
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
        """Around a swap: begins once no request is in flight. Stays closed after a failure: weights are half-loaded."""
        self._open.clear()
        await self._empty.wait()
        yield
        if not self._paused:
            self._open.set()

    def refuse_in_pause(self) -> None:
        """PausedError in a pause."""
        if self._paused:
            raise PausedError("the policy is paused while its GPUs train it")

    async def pause(self, drain_s: float) -> None:
        """Begins a pause; returns once no request is in flight, or after `drain_s`."""
        self._paused = True
        self._open.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._empty.wait()

    def resume(self) -> None:
        """Ends a pause."""
        self._paused = False
        self._open.set()


class AnswersInFlight:
    """The answers that a replica is giving, by request id, and the versions that have computed them."""

    def __init__(self) -> None:
        self._spans: dict[str, list[VersionSpan]] = {}

    @contextmanager
    def track(self, request_id: str, version: int) -> Iterator[list[VersionSpan]]:
        """Around an answer; gives its spans, to which a swap adds."""
        spans = self._spans[request_id] = [VersionSpan(version=version)]
        try:
            yield spans
        finally:
            del self._spans[request_id]

    def note_swap(self, version: int, requests: Sequence[RequestProgress]) -> None:
        """Notes for each answer how many tokens it has from the old weights. `requests`: the paused engine's."""
        for request_id, spans in self._spans.items():
            spans.append(VersionSpan(version=version, from_tokens=tokens_by_choice(request_id, requests)))


def tokens_by_choice(request_id: str, requests: Sequence[RequestProgress]) -> list[int | None]:
    """Tokens that each choice of an answer has; None for one that has ended."""
    found: dict[int, int] = {}
    for request in requests:
        if request_id in request.external_id:
            prompt = request.external_id.partition(request_id)[2].removeprefix("-")
            found[(int(prompt) if prompt.isdecimal() else 0) * request.n + request.index] = request.tokens
    return [found.get(choice) for choice in range(max(found, default=-1) + 1)]


class TokensSoFar:
    """Counts the tokens of an answer while its choices end one after the other."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def update(self, by_choice: Sequence[int | None]) -> int:
        """The tokens of all choices, with what `tokens_by_choice` says now."""
        self._tokens.update({choice: tokens for choice, tokens in enumerate(by_choice) if tokens is not None})
        return sum(self._tokens.values())


def end_process(reason: str) -> NoReturn:
    """Ends this replica and its engine at once. Serve starts another, which is ready once it holds current weights."""
    logger.critical("this replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)  # its engine's processes end with it (internals/processes.py)


def end_process_with(task: asyncio.Task[None]) -> asyncio.Task[None]:
    """Has the process end when the task ends other than by being cancelled: a replica must not live on without it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            end_process(f"{task.get_coro()} ended: {task.exception()!r}")

    task.add_done_callback(ended)
    return task
