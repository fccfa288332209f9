"""API keys: who may use the endpoint."""

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from sampo_ray.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health"})


def digests(keys: Iterable[SecretStr]) -> tuple[bytes, ...]:
    """SHA-256 of each key; only these travel to the replicas. ValueError for an empty key, which anybody has."""
    secrets = [key.get_secret_value().encode() for key in keys]
    if not all(secrets):
        raise ValueError("serve.api_keys: a key is empty; remove it or give it a value")
    return tuple(hashlib.sha256(secret).digest() for secret in secrets)


class KeyGuard:
    """ASGI middleware that lets only holders of a key through: `Authorization: Bearer <key>`. Open when there are none.

    /health and OPTIONS (which has no answer but 405) need no key. Every known key is compared in constant time.
    """

    def __init__(self, app: ASGIApp, known: tuple[bytes, ...]) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._known or _is_open(scope) or self._holds_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", code="invalid_api_key")
            await refusal.response()(scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        presented = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = presented[0].partition(b" ") if len(presented) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._known]
        return scheme.lower() == b"bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or scope["method"] == "OPTIONS"
