"""API keys with scopes.

Each request carries `Authorization: Bearer <key>`, also those of the page. There are no cookies, which a browser would
send for other sites as well. `/admin/*` needs the scope `admin`, other routes need `use`, which `admin` includes.
`/health`, `/` and `/page/*` (the page holds no data) need none.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from sampo_ray.config.keys import Key, digest, is_json, parse
from sampo_ray.config.keys import Scope as KeyScope
from sampo_ray.config.serving import ServeConfig, is_loopback
from sampo_ray.errors import KeysError
from sampo_ray.run.storage import Place, absolute
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.errors import ApiError

logger = logging.getLogger("ray.serve")  # Serve writes this one to its log files
MAX_AGE_S = 0.8  # of the keys file: a change takes effect within a second
BOTH: frozenset[KeyScope] = frozenset({"use", "admin"})
FORWARDED = (b"forwarded", b"x-forwarded-for")


@dataclass(frozen=True)
class Access:
    """Which keys are valid and what needs none. It is sent to replicas, and holds digests, never keys."""

    keys: tuple[Key, ...]  # those of `serve.api_keys`, with both scopes
    keys_file: str | None  # further keys; each replica reads it
    anonymous: frozenset[KeyScope]  # scopes that need no key
    here: frozenset[KeyScope]  # scopes that need none of who asks from the endpoint's own machine
    local: bool  # whether only that machine reaches the endpoint

    @classmethod
    def of(cls, config: ServeConfig, host: str) -> "Access":
        """For Serve that listens on `host`, whatever the configuration says. ValueError for an empty key."""
        secrets = [key.get_secret_value() for key in config.api_keys or ()]
        if not all(secrets):
            raise ValueError("serve.api_keys: a key is empty; remove it or give it a value")
        keys = tuple(Key(name=f"api-key-{n}", sha256=digest(key), scopes=BOTH) for n, key in enumerate(secrets, 1))
        local, nobody = is_loopback(host), frozenset[KeyScope]()
        anonymous = frozenset[KeyScope]({"use"}) if config.open else nobody
        here = BOTH if local and not config.keyed else nobody
        return cls(keys, absolute(config.keys_file) if config.keys_file else None, anonymous, here, local)


class KeysFile:
    """The keys in a file, at most MAX_AGE_S old.

    While the file cannot be read or is broken, the last good keys stay valid, and one warning is logged without any of
    its content. Before the first good file there are no keys. A store that hangs delays a request by MAX_AGE_S at most.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._place = Place(url)
        self._cached = CachedRead(lambda: asyncio.to_thread(self._read), MAX_AGE_S, MAX_AGE_S, clock)
        self._content: bytes | None = None
        self._warning: str | None = None

    async def keys(self) -> tuple[Key, ...]:
        with suppress(TimeoutError):
            return await self._cached.get()
        return self._cached.last or ()

    def _read(self) -> tuple[Key, ...]:
        keys, warning = self._cached.last or (), None
        try:
            content = self._place.read()
            if content != self._content:
                keys, self._content = parse(content, is_json(self._place.url)), content
                logger.info("serve.keys_file: %d keys in use", len(keys))
        except KeysError as error:
            warning = str(error)
        except Exception as error:  # each storage library has its own
            warning = f"cannot be read ({type(error).__name__})"
        if warning and warning != self._warning:
            logger.warning("serve.keys_file: %s; the last good keys stay (%d)", warning, len(keys))
        self._warning = warning
        return keys


class Authentication:
    """ASGI middleware that answers 401 without a known key and 403 where the key lacks the scope.

    Routes find the key's entry (None without one) in `request.state.key`. Where requests without a key are allowed,
    those from another site's page are not: a browser would send them for any page that its user opens. Where they are
    allowed because only this machine reaches the endpoint, their connection must come from it as well.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._file = KeysFile(access.keys_file) if access.keys_file else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        needed, key = needed_scope(scope), await self._key(scope)
        refusal = None if needed is None else self._refusal(scope, needed, key)
        if refusal is None:
            scope["state"] = {**scope.get("state", {}), "key": key}
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope, needed: KeyScope, key: Key | None) -> ApiError | None:
        if key is not None:
            return None if key.allows(needed) else ApiError(403, f"this key lacks the scope {needed!r}", code="scope")
        if needed not in self._access.anonymous | self._access.here:
            return ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", code="invalid_api_key")
        if needed not in self._access.anonymous and not is_from_here(scope):
            message = "without API keys this endpoint answers requests of its own machine only; give it keys"
            return ApiError(403, message, code="not_local")
        if is_cross_site(scope, self._access.local):
            wanted = "address it as localhost, or give it keys" if self._access.local else "use a key"
            return ApiError(403, f"requests for or from another site need an API key; {wanted}", code="foreign_site")
        return None

    async def _key(self, scope: Scope) -> Key | None:
        scheme, _, presented = header(scope, b"authorization").partition(b" ")
        known = (*self._access.keys, *(await self._file.keys() if self._file else ()))
        sha256 = hashlib.sha256(presented.strip()).hexdigest()
        matches = [key for key in known if hmac.compare_digest(sha256, key.sha256)]  # always compares with all keys
        return matches[0] if matches and scheme.lower() == b"bearer" else None


def needed_scope(scope: Scope) -> KeyScope | None:
    """The scope that a request needs, or None. OPTIONS needs none, since every route answers it with 405."""
    path, method = route_path(scope), scope.get("method")
    is_page = method in ("GET", "HEAD") and (path in ("", "/") or path.startswith("/page/"))
    if scope["type"] == "http" and (method == "OPTIONS" or path == "/health" or is_page):
        return None
    return "admin" if is_admin_path(path) else "use"


def is_admin_path(path: str) -> bool:
    """Also true for spellings that the router does not accept, such as `/ADMIN` and `//admin`."""
    return path.lower().lstrip("/").split("/")[0] == "admin"


def route_path(scope: Scope) -> str:
    """The path below the application's route prefix, as the router sees it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path[len(root) :]
    return below if path.startswith(root) and below[:1] in ("", "/") else path


def is_from_here(scope: Scope) -> bool:
    """Whether a request's connection comes from this machine, and no proxy says that it forwards another's. (The
    server takes the word of a proxy that it trusts for the peer's address, and of any if it is told to.)
    """
    peer = scope.get("client")
    forwarded = any(key in FORWARDED for key, _ in scope["headers"])
    return peer is not None and is_loopback(peer[0]) and not forwarded


def is_cross_site(scope: Scope, local: bool) -> bool:
    """Whether another site's page sends it or, if `local`, its Host is a name that means loopback (DNS rebinding)."""
    host, origin = (header(scope, name).decode("latin-1").lower() for name in (b"host", b"origin"))
    rebound = local and not is_loopback(_split(f"//{host}").hostname or "")
    return rebound or bool(origin and _split(origin).netloc != host)


def header(scope: Scope, name: bytes) -> bytes:
    """The header's value; empty when it is missing or given more than once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else b""


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # a client may send anything
        return urlsplit("")
