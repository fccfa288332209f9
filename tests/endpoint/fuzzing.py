"""Invalid and hostile requests as raw bytes, and what an endpoint may answer to them."""

import contextlib
import http.client
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hypothesis import strategies as st

from tests.waiting import scaled

ANSWER_SECONDS = 60.0
FOLDERS = ("home", "tmp", "root", "usr", "etc")
LEAKS = ("Traceback", "site-packages", 'File "', "sampo_ray", ".py", *(f"/{folder}/" for folder in FOLDERS))
METHODS = ["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "get"]
OPENAI = ("/v1/chat/completions", "/v1/completions")
RIGHT = {
    OPENAI[0]: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    OPENAI[1]: {"prompt": "hello", "max_tokens": 2},
}
ADMIN = tuple(f"/admin/{name}" for name in ("versions", "promote", "rollback", "pin", "unpin", "label"))
ROUTES = [*OPENAI, *ADMIN, "/feedback", "/run", "/v1/models", "/v1/models/policy", "/health", "", "/", "/page/app.js"]

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.sampled_from([513, 2**31, 2**63, -(2**63), 10**30, 1e300, 0.5, 1.0, -0.0, 10_000])
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "policy", "policy@1", "latest", "text", "json_object", "auto", "required"])
    | st.sampled_from(["none", "left", "json_schema", "function", "../../etc/passwd", "\x00", "a" * 300, "up", "down"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "json_schema", "schema", "json", "regex", "0", "5"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
NUMBERS = [-1, 0, 1, 2, 3, 5, 20, 100, 513, 2**31, 2**63 - 1]
OTHER_FIELDS = ["version", "label", "request_id", "better", "worse", "rating", "edited", "feedback", "name"]
SEGMENTS = st.sampled_from(
    ["..", "%2e%2e", "..%2f", "%2F", ".", "etc", "passwd", "v1", "models", "admin", "page", "%00"]
)
PATHS = (
    st.sampled_from(ROUTES)
    | st.sampled_from(OPENAI)
    | st.builds(
        lambda route, end: route + end, st.sampled_from(ROUTES), st.sampled_from(["/", "//", "?a=b", "%20", "/x"])
    )
    | st.builds(
        lambda root, parts: root + "/".join(parts),
        st.sampled_from(["/page/", "/v1/models/", "/", "/admin/"]),
        st.lists(SEGMENTS | st.text(alphabet="ab%~!$&'()*+,;=:@-._", max_size=6), min_size=1, max_size=6),
    )
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "origin",
                "content-type",
                "x-request-id",
                "content-length",
                "transfer-encoding",
                "accept",
                "cookie",
                "range",
                "host",
                "expect",
                "upgrade",
                "x-forwarded-for",
                "x-request-timeout-seconds",
                "serve_multiplexed_model_id",
            ]
        )
        | st.text(alphabet="abcx-_", min_size=1, max_size=12),
        st.sampled_from(
            [
                "chunked",
                "100-continue",
                "websocket",
                "0",
                "-1",
                "5",
                "http://elsewhere.example",
                "\xff\xfe",
                "[",
                "a:b:c",
            ]
        )
        | st.text(alphabet=st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=30),
    ),
    max_size=3,
)


def plausible(annotation: str) -> st.SearchStrategy[Any]:
    """Values that fit a field with this annotation."""
    kinds: list[tuple[str, st.SearchStrategy[Any]]] = [
        ("list[int]", st.lists(st.sampled_from(NUMBERS), max_size=4)),
        ("list[str]", st.lists(st.text(max_size=4), max_size=4)),
        ("dict[str, float]", st.dictionaries(st.sampled_from(["0", "5", "400"]), st.floats(-200, 200), max_size=2)),
        ("float", st.floats(-2.5, 2.5)),
        ("int", st.sampled_from(NUMBERS)),
        ("bool", st.booleans()),
        ("str", st.text(max_size=8)),
    ]
    return st.one_of([values for kind, values in kinds if kind in annotation] or [VALUES])


def bodies(path: str, fields: Callable[[str], dict[str, str]]) -> st.SearchStrategy[bytes]:
    """Bodies for a route: nearly valid ones, other JSON, not JSON; `fields` has the annotations of OpenAI's routes."""
    route = next((route for route in OPENAI if path.startswith(route)), None)
    names = fields(route) if route else dict.fromkeys(OTHER_FIELDS, "int or str")
    right: dict[str, Any] = RIGHT.get(route, {})
    change = st.sampled_from(sorted(names)).flatmap(
        lambda name: st.tuples(st.just(name), plausible(names[name]) | plausible(names[name]) | VALUES)
    )
    nearly = st.lists(change, max_size=2).map(lambda changes: json.dumps({**right, **dict(changes)}).encode())
    other = (
        nearly.flatmap(lambda body: st.integers(0, len(body)).map(lambda end: body[:end]))
        | VALUES.map(lambda value: json.dumps(value).encode())
        | st.binary(max_size=40)
        | st.sampled_from([b"", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe\x00", b'{"prompt": "\\ud800"}', b"0" * 30_000])
    )
    return st.integers(0, 9).flatmap(lambda chance: other if chance > 6 else nearly)


@dataclass(frozen=True)
class RawRequest:
    """One request as it is sent."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def raw(self, host: str) -> bytes:
        names = {name.lower() for name, _ in self.headers}
        usual = [("connection", "close")] + ([] if "host" in names else [("host", host)])
        if not names & {"content-length", "transfer-encoding"}:
            usual.append(("content-length", str(len(self.body))))
        lines = [f"{self.method} {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*usual, *self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + self.body


@st.composite
def raw_requests(
    draw: st.DrawFn, prefix: str, keys: tuple[str, ...], fields: Callable[[str], dict[str, str]]
) -> RawRequest:
    path = draw(PATHS)
    right = "POST" if path.startswith((*OPENAI, "/feedback", *ADMIN[1:])) else "GET"
    method = draw(st.just(right) | st.just(right) | st.sampled_from(METHODS))
    key = draw(st.sampled_from([*keys, *keys, "wrong", None]))
    headers = [] if key is None else [("authorization", f"Bearer {key}")]
    body = draw(bodies(path, fields)) if method != "GET" or draw(st.booleans()) else b""
    more = draw(HEADERS) if draw(st.booleans()) else []
    # Ray's proxy answers 500 to these headers if they are not UTF-8; the request does not reach this program.
    more = [(name, value) for name, value in more if value.isascii() or not name.startswith(("x-request", "serve_"))]
    return RawRequest(method, prefix + path, tuple(headers + more), body)


def send(url: str, raw: bytes) -> tuple[int, dict[str, str], str]:
    """Sends bytes to the server at `url`; returns status, headers and body, or status 0 if it closes without an answer.

    TimeoutError if nothing arrives for ANSWER_SECONDS.
    """
    at = urlsplit(url)
    with socket.create_connection((at.hostname, at.port), timeout=scaled(ANSWER_SECONDS)) as connection:
        with contextlib.suppress(ConnectionError):  # the server may answer and close before it has read everything
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR) if b"content-length" not in raw.lower() else None
        answer = http.client.HTTPResponse(connection, method=raw.split(b" ")[0].decode("latin-1"))
        try:
            answer.begin()
            text = answer.read().decode("utf-8", "replace")
        except (ConnectionError, http.client.HTTPException):
            return 0, {}, ""
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def problem(request: RawRequest, status: int, headers: dict[str, str], text: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if status == 500 or status > 504:
        return f"status {status}"
    leak = next((leak for leak in LEAKS if leak in text and leak not in request.path), None)
    if leak and headers.get("content-type", "").startswith("application/json") and status >= 400:
        return f"leaks {leak!r}"
    granted = [name for name in headers if name.startswith("access-control")]
    return f"lets other sites in: {granted}" if granted else None
