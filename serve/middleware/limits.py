"""Limits: requests and tokens a minute for each key, requests in flight for all, and the time that a body may take.

Counts live in the endpoint's process: exact for its one replica, and lost when it restarts. Only POST requests outside
of `/admin` count. Tokens (of prompt and answer) are charged when the answer ends: a key may exceed its limit by what it
has in flight, and then waits until that is refilled. Requests without a key share one quota.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sampo_ray.actors.policy import sse
from sampo_ray.config.keys import Key
from sampo_ray.config.serving import ServeConfig
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.middleware.auth import is_admin_path, route_path

BODY_TIMEOUT_S = 30.0
MAX_IN_FLIGHT = 1000  # requests of all keys that the endpoint works on at once; more get a 429
BYTES_PER_TOKEN = 4
# In JSON text no string holds these: quotation marks in strings are escaped.
USAGE = re.compile(rb'"usage":\{[^{}]*?"total_tokens":(\d+)')
NO_CHOICES = b'"choices":[]'  # of a stream's events, the one with the usage of all choices


class Bucket:
    """A token bucket: it starts full with `per_minute` and is refilled evenly. `clock` gives seconds. More can be taken
    than it holds: its level is then below zero, and the wait longer.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = float(per_minute), clock
        self._level, self._at = self._size, clock()

    def wait(self, amount: float = 1.0) -> float:
        """Seconds until `amount` is available, if nobody takes any before; 0 when it is available now."""
        missing = min(amount, self._size) - self._now()
        return missing * 60.0 / self._size if missing > 1e-6 else 0.0

    def take(self, amount: float = 1.0) -> None:
        self._level = self._now() - amount

    def _now(self) -> float:
        at = self._clock()
        self._level = min(self._size, self._level + max(0.0, at - self._at) * self._size / 60.0)
        self._at = max(at, self._at)
        return self._level


@dataclass(frozen=True)
class Limits:
    """Limits of each key; None is no limit."""

    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, config: ServeConfig) -> "Limits":
        return cls(**{field: getattr(config, field) for field in cls.__dataclass_fields__})


class Quota:
    """The requests and tokens that one key has left."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        numbers = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._buckets = {unit: Bucket(number, clock) for unit, number in numbers.items() if number}

    def admit(self) -> None:
        """Takes one request. Raises ApiError (429), which says when to try again, when none is left."""
        for unit, bucket in self._buckets.items():
            if seconds := math.ceil(bucket.wait()):
                message = f"this key has used up its {unit} per minute; try again in {seconds} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_s=seconds)
        self.charge("requests", 1)

    def charge(self, unit: str, count: int) -> None:
        if unit in self._buckets:
            self._buckets[unit].take(count)


class TokenCounter:
    """Counts the tokens of one answer as it is sent, without parsing JSON for each token of a stream."""

    def __init__(self) -> None:
        self.hide_usage = False  # at a stream's end, where the endpoint asked for it and not the client
        self.generated = 0  # tokens that the engine is known to have computed
        self.request_bytes = self._usage = self._events = 0
        self._ended = self._failed = False

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer, by the answer's usage. For an answer that ended before it (the client hung up,
        or it took too long): what was generated, at least one for each event sent, and one for each BYTES_PER_TOKEN of
        the request. None for an error without either, and for an answer that has no usage.
        """
        computed = max(self.generated, self._events)
        if self._usage or (not computed and (self._failed or self._ended)):
            return self._usage
        return computed + self.request_bytes // BYTES_PER_TOKEN

    def count(self, message: Message) -> Message:
        """Counts one ASGI message of the answer, and returns the message to send in its place."""
        if message["type"] == "http.response.start":
            self._failed = message["status"] >= 400
        elif message["type"] == "http.response.body":
            body = bytes(message.get("body", b""))
            *events, rest = body.split(sse.END_BYTES)
            self._events += len(events)
            self._ended = not message.get("more_body", False)
            whole = [each for each in events if NO_CHOICES in each] if self._events else [rest]
            if found := [total for each in whole for total in USAGE.findall(each)]:
                self._usage = int(found[-1])
                if self.hide_usage:
                    body = sse.without(body, USAGE.search)
            return {**message, "body": body}
        return message


class LimitRequests:
    """ASGI middleware that holds each key (`request.state.key`) to its limits, and each body to BODY_TIMEOUT_S. Routes
    find `limits` and the answer's `token_counter` in `request.state`.
    """

    def __init__(self, app: ASGIApp, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._limits, self._clock = app, limits, clock
        self._quotas: dict[str | None, Quota] = {}
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        quota, counter = self._quota(scope), TokenCounter()
        scope["state"] = {**scope.get("state", {}), "limits": self._limits, "token_counter": counter}
        try:
            if self._in_flight >= MAX_IN_FLIGHT and not is_admin_path(route_path(scope)):
                raise ApiError(429, "the endpoint has as many requests as it takes; try again soon", code="queue_full")
            if quota is not None:
                quota.admit()
        except ApiError as refusal:
            return await refusal.response()(scope, receive, send)

        async def counted(message: Message) -> None:
            await send(counter.count(message))

        self._in_flight += 1
        try:
            await self._app(scope, _with_deadline(receive, counter), counted if quota else send)
        finally:
            self._in_flight -= 1
            if quota is not None:
                quota.charge("tokens", counter.tokens)
        return None

    def _quota(self, scope: Scope) -> Quota | None:
        limited = self._limits.requests_per_minute or self._limits.tokens_per_minute
        if not limited or scope["method"] != "POST" or is_admin_path(route_path(scope)):
            return None
        key: Key | None = scope.get("state", {}).get("key")
        return self._quotas.setdefault(key.sha256 if key else None, Quota(self._limits, self._clock))


def _with_deadline(receive: Receive, counter: TokenCounter) -> Receive:
    """`receive`, which raises ApiError (408) where the route reads a body that takes too long."""
    deadline: float | None = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

    async def receive_in_time() -> Message:
        nonlocal deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"body: did not arrive within {BODY_TIMEOUT_S:.0f} s", code="body_too_slow") from None
        if message["type"] == "http.request":
            counter.request_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                deadline = None  # only a disconnect can follow
        return message

    return receive_in_time
