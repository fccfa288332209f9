"""Keys, scopes, a keys file that changes, and what a browser may do."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from sampo_ray.config.keys import Key, digest, render
from sampo_ray.config.serving import ServeConfig
from sampo_ray.run.storage import Place
from sampo_ray.serve import errors
from sampo_ray.serve.middleware import auth
from sampo_ray.serve.middleware.auth import Access, Authentication, KeysFile, is_admin_path, needed_scope, route_path
from sampo_ray.serve.middleware.headers import SECURITY_HEADERS, ResponseHeaders

KEYS = (SecretStr("one"), SecretStr("two words"))
PATHS = (
    "/v1/models",
    "/feedback",
    "/run",
    "/nothing",
    "/health/",
    "/%2Fhealth",
    "/HEALTH",
    "/health/x",
    "/page",
    "/page-x",
)


def call(app: Any, method: str, path: str, host: str = "127.0.0.1:8000", **more: Any) -> httpx.Response:
    peer, root = more.pop("peer", "127.0.0.1"), more.pop("root_path", "")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root, client=(peer, 50000))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def access_of(listens: str | None = None, **config: Any) -> Access:
    """Of an endpoint whose Serve listens on `listens`, or where the configuration asks for."""
    settings = ServeConfig(**{"api_keys": (), **config})
    return Access.of(settings, listens or settings.host)


def small_app(**config: Any) -> FastAPI:
    """Routes that answer with the name of the request's key, behind the guard of `access_of`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(Authentication, access=access_of(**config))
    app.add_middleware(ResponseHeaders, defaults=lambda: SECURITY_HEADERS)

    async def who(request: Request) -> dict[str, str | None]:
        return {"key": request.state.key and request.state.key.name}

    async def broken() -> None:
        raise RuntimeError("a secret")

    for path in ("/", "/health", "/page/{name}", "/v1/models", "/admin/versions", "/admin"):
        app.add_api_route(path, who, methods=["GET"])
    for path in ("/v1/completions", "/admin/promote"):
        app.add_api_route(path, who, methods=["POST"])
    app.add_api_route("/broken", broken)
    return app


def keyed(tmp_path: Path, **config: Any) -> FastAPI:
    """An app whose keys file has `user-key` (use) and `admin-key` (admin)."""
    file = tmp_path / "keys.yaml"
    file.write_bytes(render([entry("user"), entry("admin")], False))
    return small_app(keys_file=str(file), **config)


def entry(name: str) -> Key:
    scope: Any = "admin" if name == "admin" else "use"
    return Key(name=name, sha256=digest(f"{name}-key"), scopes=frozenset([scope]))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("value", ["Bearer one", "bearer one", "Bearer two words", "Bearer  one "])
def test_each_of_the_keys_is_accepted(value: str) -> None:
    for path in ("/nothing", "/admin/nothing"):
        assert call(small_app(api_keys=KEYS), "GET", path, headers={"authorization": value}).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "one")],
        [("authorization", "Basic one")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer oneone")],
        [("authorization", "Bearer one, Bearer two words")],
        [("authorization", "Bearer one"), ("authorization", "Bearer three")],
        [("x-api-key", "one")],
        [("cookie", "authorization=Bearer one")],
        [("authorization", f"Bearer {digest('one')}")],
    ],
)
def test_nothing_else_is_accepted(headers: list[tuple[str, str]]) -> None:
    for path in (*PATHS, "/v1/models?key=one", "/admin/versions"):
        answer = call(small_app(api_keys=KEYS), "GET", path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_random_keys_are_refused(value: bytes) -> None:
    guard = Authentication(small_app(), access_of(api_keys=KEYS))
    scope = {"type": "http", "headers": [(b"authorization", b"Bearer " + value)]}
    assert bool(asyncio.run(guard._key(scope))) == (value.strip() in (b"one", b"two words"))


def test_a_key_reaches_the_routes_of_its_scopes(tmp_path: Path) -> None:
    app = keyed(tmp_path)
    for key, path, status in [
        ("user-key", "/v1/models", 200),
        ("user-key", "/admin/versions", 403),
        ("user-key", "/admin", 403),
        ("user-key", "/admin/nothing", 403),
        ("admin-key", "/v1/models", 200),
        ("admin-key", "/admin/versions", 200),
        ("nobody's", "/admin/versions", 401),
    ]:
        answer = call(app, "GET", path, headers=bearer(key))
        assert answer.status_code == status, (key, path)
        if status == 200:
            assert answer.json() == {"key": key.removesuffix("-key")}
        if status == 403:
            assert "'admin'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/%2Fadmin/versions", "/%61dmin/versions", "/ADMIN/versions", "/admin//versions"])
def test_every_spelling_of_an_admin_route_needs_the_scope_admin(tmp_path: Path, path: str) -> None:
    assert call(keyed(tmp_path), "GET", path, headers=bearer("user-key")).status_code == 403


@given(st.text(alphabet="/admin%.A?#", max_size=14), st.sampled_from(["", "/run-a"]))
def test_every_path_that_the_router_sends_to_an_admin_route_needs_admin(path: str, root: str) -> None:
    scope = {"type": "http", "method": "POST", "path": f"{root}/{path}", "root_path": root}
    below = route_path(scope)
    assert below == f"/{path}"
    if below == "/admin" or below.startswith("/admin/"):
        assert is_admin_path(below) and needed_scope(scope) == "admin"
    assert needed_scope(scope) is not None


def test_the_page_and_health_need_no_key_under_a_prefix_either() -> None:
    app = small_app(api_keys=KEYS)
    for path in ("/", "/health", "/page/app.js"):
        assert call(app, "GET", path).status_code == 200
        assert call(app, "GET", f"/run-a{path}", root_path="/run-a").status_code == 200
        assert call(app, "POST", path).status_code == (405 if path == "/health" else 401)
    assert call(app, "GET", "/run-a/nothing", root_path="/run-a").status_code == 401
    assert call(app, "GET", "/run-a/admin/versions", root_path="/run-a").status_code == 401


def test_a_loopback_endpoint_without_keys_is_open() -> None:
    app = small_app()
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "localhost"):
        assert call(app, "GET", "/v1/models", host).json() == {"key": None}
        assert call(app, "POST", "/admin/promote", host, headers={"origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://elsewhere.example"),
        ("127.0.0.1:8000", "http://127.0.0.1:9000"),
        ("127.0.0.1:8000", "null"),
        ("127.0.0.1:8000", "http://["),
        ("rebound.example:8000", "http://rebound.example:8000"),
        ("rebound.example:8000", None),
        ("localhost.example:8000", None),
    ],
)
def test_other_sites_pages_cannot_use_an_open_endpoint_through_its_users_browser(host: str, origin: str | None) -> None:
    answer = call(small_app(), "POST", "/admin/promote", host, headers={"origin": origin} if origin else {})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_site"


HERE = ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1")
ELSEWHERE = ("192.0.2.2", "::ffff:192.0.2.2", "2001:db8::2", "fe80::1%eth0", "0.0.0.0", "", "localhost.example")


@pytest.mark.parametrize("path", ["/v1/models", "/admin/versions"])
def test_without_keys_only_connections_from_this_machine_are_answered_whatever_their_headers_say(path: str) -> None:
    for peer in HERE:
        assert call(small_app(), "GET", path, peer=peer).status_code == 200
    for peer in ELSEWHERE:
        for host in ("localhost:8000", "127.0.0.1:8000"):
            answer = call(small_app(), "GET", path, host, peer=peer)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_local")
        assert call(small_app(), "GET", "/health", peer=peer).status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
def test_without_keys_what_a_proxy_forwards_is_not_from_this_machine(header: str) -> None:
    for value in ("192.0.2.2", "127.0.0.1", "for=127.0.0.1", ""):
        answer = call(small_app(), "POST", "/admin/promote", headers={header: value})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_local")


def test_a_connection_without_an_address_is_not_from_this_machine() -> None:
    guard = Authentication(small_app(), access_of())
    for more in ({}, {"client": None}):
        refusal = guard._refusal({"type": "http", "headers": [(b"host", b"localhost")], **more}, "use", None)
        assert refusal is not None and refusal.code == "not_local"


def test_keys_and_openness_hold_for_any_peer() -> None:
    for peer in (*HERE, *ELSEWHERE):
        keyed = call(small_app(api_keys=KEYS), "GET", "/admin/versions", headers=bearer("one"), peer=peer)
        assert keyed.status_code == 200
        assert call(small_app(api_keys=KEYS), "GET", "/v1/models", peer=peer).status_code == 401
        assert call(small_app(host="0.0.0.0", open=True), "GET", "/v1/models", peer=peer).status_code == 200


def test_what_is_open_goes_by_where_serve_listens_and_not_by_the_configuration() -> None:
    for path in ("/v1/models", "/admin/versions"):
        assert call(small_app(listens="0.0.0.0"), "GET", path, "localhost").status_code == 401
        assert call(small_app(host="0.0.0.0", listens="127.0.0.1"), "GET", path, "localhost").status_code == 200
    assert call(small_app(listens="0.0.0.0", open=True), "GET", "/v1/models", "far.example").status_code == 200
    assert call(small_app(listens="0.0.0.0", open=True), "POST", "/admin/promote", "localhost").status_code == 401


def test_an_open_endpoint_can_be_used_by_anybody_but_not_administered(tmp_path: Path) -> None:
    for app in (small_app(host="0.0.0.0", open=True), keyed(tmp_path, host="0.0.0.0", open=True)):
        assert call(app, "POST", "/v1/completions", "far.example").status_code == 200
        assert call(app, "POST", "/v1/completions", "far.example", headers=bearer("EMPTY")).status_code == 200
        elsewhere = {"origin": "http://elsewhere.example"}
        assert call(app, "POST", "/v1/completions", "far.example", headers=elsewhere).status_code == 403
        assert call(app, "POST", "/admin/promote", "far.example").status_code == 401
    assert call(app, "POST", "/admin/promote", "far.example", headers=bearer("admin-key")).status_code == 200


def test_a_keys_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    for file in ("keys.yaml", "none.yaml"):
        assert call(small_app(keys_file=str(tmp_path / file)), "GET", "/v1/models").status_code == 401


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="api_keys"):
        Access.of(ServeConfig.model_construct(api_keys=(SecretStr("one"), SecretStr(""))), "127.0.0.1")


def test_what_travels_to_replicas_holds_no_key() -> None:
    assert "two words" not in repr(access_of(api_keys=KEYS))


def test_a_websocket_needs_a_key_too() -> None:
    sent: list[Any] = []

    async def connect() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/health", "headers": []}
        await Authentication(small_app(), access_of(api_keys=KEYS))(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(connect())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_every_answer_has_the_security_headers_and_none_for_other_sites(tmp_path: Path) -> None:
    app = keyed(tmp_path)
    answers = [
        call(app, method, path, headers={**bearer("user-key"), "origin": "http://elsewhere.example"})
        for method in ("GET", "POST", "OPTIONS", "HEAD", "BREW")
        for path in ("/", "/health", "/v1/models", "/admin/versions", "/nothing", "/broken")
    ]
    answers.append(call(app, "GET", "/v1/models"))
    assert {200, 401, 403, 404, 405, 500} <= {answer.status_code for answer in answers}
    for answer in answers:
        assert {name: answer.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", [b"[", b"", b"a:b:c", b"\xff", b"http://x/"])
def test_no_host_header_breaks_anything(host: bytes) -> None:
    for app in (small_app(), small_app(api_keys=KEYS)):
        for path in ("/nothing", "/v1/models", "/health"):
            headers = [(b"host", host), (b"authorization", b"Bearer one"), (b"origin", host)]
            assert call(app, "GET", path, headers=headers).status_code in (200, 403, 404)


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def names(file: KeysFile) -> list[str]:
    return [key.name for key in asyncio.run(file.keys())]


@pytest.fixture
def serve_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(auth, "logger", logging.getLogger("test-of-auth"))  # Serve's own reaches no other handler
    caplog.set_level(logging.INFO)
    return caplog


def test_a_changed_file_takes_effect_within_a_second(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    file.write_bytes(render([entry("a"), entry("b")], False))
    keys = KeysFile(str(file), clock)
    assert names(keys) == ["a", "b"]
    file.write_bytes(render([entry("b")], False))
    assert names(keys) == ["a", "b"]
    clock.now += 1.0
    assert names(keys) == ["b"]


@pytest.mark.parametrize(
    "breaking",
    [
        lambda file: file.write_text("- {name: SECRET"),
        lambda file: file.write_text("- {name: a, sha256: SECRET, scopes: [use]}"),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_broken_file_keeps_the_last_good_keys_and_warns_once(
    tmp_path: Path, serve_log: pytest.LogCaptureFixture, breaking: Callable[[Path], Any]
) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    file.write_bytes(render([entry("a")], False))
    keys = KeysFile(str(file), clock)
    names(keys)
    breaking(file)
    for _ in range(3):
        clock.now += 1.0
        assert names(keys) == ["a"]
    (warning,) = [record.getMessage() for record in serve_log.records if record.levelno == logging.WARNING]
    assert "serve.keys_file" in warning and "last good keys stay (1)" in warning
    assert not any(part in warning for part in ("SECRET", digest("a-key"), str(file)))


def test_while_a_store_hangs_requests_get_the_last_good_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, clock, stuck, reads = tmp_path / "keys.yaml", Clock(), threading.Event(), []
    file.write_bytes(render([entry("a")], False))
    keys = KeysFile(str(file), clock)

    async def ask() -> None:
        assert [key.name for key in await keys.keys()] == ["a"]
        clock.now += 1.0
        monkeypatch.setattr(Place, "read", lambda place: reads.append(place) or stuck.wait(60))
        for answer in await asyncio.gather(*(keys.keys() for _ in range(5))):
            assert [key.name for key in answer] == ["a"]
        assert not stuck.is_set()
        stuck.set()

    asyncio.run(ask())
    assert len(reads) == 1
