"""How much one key may ask for: requests and tokens a minute.

Counted in the endpoint's own process: exact for one replica of it (there is one), and forgotten when it restarts.
Requests are those that make something happen (POST, except `/admin`). Tokens are those of prompt and answer together,
as the answer's `usage` counts them, taken off once the answer has ended: so a key may overdraw its minute by what it
has in flight, and waits until that is paid back. Those without a key, where they are let in, share one account.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sampo_ray.config.serve import ServeConfig
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.middleware.auth import is_admin, route_path

BODY_TIMEOUT_S = 30.0
MAX_IN_FLIGHT = 1000
"""Requests that the endpoint works on at once, of all keys together; more are told to come again."""
BYTES_PER_TOKEN = 4
NEGLIGIBLE = 1e-6
EVENT = b"\n\n"  # what ends an event of a stream; inside of JSON a line break is written \n
# In JSON text no string holds this: quotation marks in strings are escaped.
USAGE = re.compile(rb'"usage":\{[^{}]*?"total_tokens":(\d+)')


class Bucket:
    """A token bucket: `per_minute` at most and at first, refilled evenly; `clock` gives seconds.

    What is taken may exceed what is there: the level is then below zero, and the wait longer.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = float(per_minute), clock
        self._level, self._at = self._size, clock()

    def wait(self, amount: float = 1.0) -> float:
        """Seconds until `amount` will be there if nobody takes any; 0: it is there."""
        missing = min(amount, self._size) - self._now()
        return missing * 60.0 / self._size if missing > NEGLIGIBLE else 0.0

    def take(self, amount: float = 1.0) -> None:
        self._level = self._now() - amount

    def _now(self) -> float:
        at = self._clock()
        self._level = min(self._size, self._level + max(0.0, at - self._at) * self._size / 60.0)
        self._at = max(at, self._at)
        return self._level


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, config: ServeConfig) -> "Limits":
        return cls(**{field: getattr(config, field) for field in cls.__dataclass_fields__})


class Account:
    """What one key has left."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None

    def admit(self) -> None:
        """Takes one request off. ApiError (429), saying when to come again, where there is none left."""
        for field, bucket in (("requests_per_minute", self._requests), ("tokens_per_minute", self._tokens)):
            if bucket is not None and (wait := bucket.wait()) > 0:
                seconds = math.ceil(wait)
                message = f"this key has used up its {field.replace('_', ' ')}; try again in {seconds} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=seconds)
        if self._requests is not None:
            self._requests.take()

    def charge(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)


class Meter:
    """Counts the tokens of one answer from what passes. Nothing is parsed as JSON: streams pass one token at a time."""

    def __init__(self) -> None:
        self.hide_usage = False
        """The usage at a stream's end was asked for by us, not by the client, who is not to see it."""
        self._usage, self._ended = 0, False
        self._events, self._received = 0, 0
        self._failed = False

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer, by the answer's usage. Of an answer that was cut off before it: one for each
        event that had passed, and one for each BYTES_PER_TOKEN of the request."""
        whole = self._ended and not self._events  # answers that are no streams; some have no usage
        if self._usage or self._failed or whole:
            return self._usage
        return self._events + self._received // BYTES_PER_TOKEN

    def received(self, count: int) -> None:
        self._received += count

    def passing(self, message: Message) -> Message:
        """Looks at a message of the answer; returns what to send in its place."""
        if message["type"] == "http.response.start":
            self._failed = message["status"] >= 400
        elif message["type"] == "http.response.body":
            body = bytes(message.get("body", b""))
            self._events += body.count(EVENT)
            self._ended = not message.get("more_body", False)
            if found := USAGE.findall(body):
                self._usage = int(found[-1])
                if self.hide_usage:
                    body = b"".join(event + EVENT for event in body.split(EVENT) if event and not USAGE.search(event))
            return {**message, "body": body}
        return message


class Limited:
    """ASGI middleware that holds each key (`request.state.key`) to its limits, and each body to BODY_TIMEOUT_S.

    The routes find the `limits` and the answer's `meter` in `request.state`.
    """

    def __init__(self, app: ASGIApp, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._limits, self._clock = app, limits, clock
        self._accounts: dict[str | None, Account] = {}
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        account, meter = self._account(scope), Meter()
        scope["state"] = {**scope.get("state", {}), "limits": self._limits, "meter": meter}
        try:
            if self._in_flight >= MAX_IN_FLIGHT and not is_admin(route_path(scope)):
                raise ApiError(429, "the endpoint has as many requests as it takes; try again soon", code="queue_full")
            if account is not None:
                account.admit()
        except ApiError as refusal:
            return await refusal.response()(scope, receive, send)

        async def metered(message: Message) -> None:
            await send(meter.passing(message))

        self._in_flight += 1
        try:
            await self._app(scope, _bounded(receive, meter), metered if account else send)
        finally:
            self._in_flight -= 1
            if account is not None:
                account.charge(meter.tokens)
        return None

    def _account(self, scope: Scope) -> Account | None:
        if scope["method"] != "POST" or is_admin(route_path(scope)):
            return None
        if not (self._limits.requests_per_minute or self._limits.tokens_per_minute):
            return None
        key: Any = scope.get("state", {}).get("key")
        sha256 = key.sha256 if key else None  # of known keys only: as many accounts as keys
        return self._accounts.setdefault(sha256, Account(self._limits, self._clock))


def _bounded(receive: Receive, meter: Meter) -> Receive:
    """Reads on while the body is not too slow; else ApiError (408), where the route reads it."""
    deadline: float | None = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

    async def bounded() -> Message:
        nonlocal deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"body: did not arrive within {BODY_TIMEOUT_S:.0f} s", code="body_too_slow") from None
        if message["type"] == "http.request":
            meter.received(len(message.get("body", b"")))
            if not message.get("more_body", False):
                deadline = None  # what comes now is only that the client has left
        return message

    return bounded
