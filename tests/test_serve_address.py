"""Where Serve listens decides the address of an endpoint, who may use it without a key, and whether there is one."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from ray.serve.schema import ApplicationStatus

from sampo_ray.config.serving import ServeConfig, is_loopback
from sampo_ray.errors import ConfigError, EndpointError, FleetError
from sampo_ray.internals.serve import HttpProxies, http_proxies, serve_status, within
from sampo_ray.serve import endpoint
from sampo_ray.serve.endpoint import (
    await_endpoint,
    base_url,
    deploy_endpoint,
    free_port,
    notes_on,
    start_serve,
)
from tests.waiting import scaled

KEYS = (SecretStr("one"),)


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(**{"api_keys": (), **fields})


def proxies(host: str = "127.0.0.1", port: int = 8000, location: str = "HeadOnly", **more: Any) -> HttpProxies:
    return HttpProxies(host, port, location, **more)


@pytest.mark.parametrize(
    ("listens", "prefix", "proxy_ip", "url"),
    [
        (proxies(), "/", None, "http://127.0.0.1:8000"),
        (proxies("0.0.0.0"), "/run-a", None, "http://127.0.0.1:8000/run-a"),
        (proxies("::1"), "/", None, "http://[::1]:8000"),
        (proxies("::", 9000), "/", None, "http://[::1]:9000"),
        (proxies("0.0.0.0", tls=True), "/", None, "https://127.0.0.1:8000"),
        (proxies("0.0.0.0"), "/", "10.0.0.7", "http://10.0.0.7:8000"),
        (proxies("10.1.0.7"), "/", "10.0.0.7", "http://10.1.0.7:8000"),
        (proxies(), "/", "10.0.0.7", "http://127.0.0.1:8000"),
    ],
)
def test_the_url_is_that_of_the_proxy_as_this_machine_reaches_it(
    listens: HttpProxies, prefix: str, proxy_ip: str | None, url: str
) -> None:
    assert base_url(listens, prefix, proxy_ip) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2", "head.example", ""])
@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_a_run_without_keys_does_not_use_a_serve_that_others_reach(host: str, location: str) -> None:
    address = f"[{host}]:8123" if ":" in host else f"{host}:8123"
    for asks in (config(), config(host="0.0.0.0"), config(port=0)):
        with pytest.raises(EndpointError) as refused:
            notes_on(asks, proxies(host, 8123, location))
        for word in (address, "SAMPO_API_KEYS", "serve.keys_file", "serve.open=true", "another cluster"):
            assert word in str(refused.value)
    for asks in (config(api_keys=KEYS), config(keys_file="keys.yaml"), config(open=True)):
        assert len(notes_on(asks, proxies(host, 8123, location))) == 1


@pytest.mark.parametrize("asks", [config(), config(api_keys=KEYS), config(open=True)])
def test_a_serve_without_a_proxy_is_named_at_once_with_what_to_do(asks: ServeConfig) -> None:
    with pytest.raises(EndpointError, match=r"without an HTTP proxy.*serve\.enabled=false.*`serve shutdown`"):
        notes_on(asks, proxies(location="Disabled"))


@pytest.mark.parametrize(
    ("asks", "has", "words"),
    [
        (config(), proxies(), []),
        (config(host="localhost"), proxies(), []),
        (config(port=0), proxies(port=9000), []),
        (config(), proxies(port=9000), ["127.0.0.1:9000", "serve.port=8000", "`serve shutdown`"]),
        (config(host="0.0.0.0", api_keys=KEYS), proxies(), ["127.0.0.1:8000", "serve.host=0.0.0.0"]),
        (config(host="10.0.0.7", port=0, api_keys=KEYS), proxies("0.0.0.0"), ["0.0.0.0:8000", "serve.host=10.0.0.7"]),
        (config(), proxies(request_timeout_s=310.0), []),
        (config(request_timeout_s=600), proxies(request_timeout_s=310.0), ["310 s", "serve.request_timeout_s=600"]),
    ],
)
def test_what_does_not_take_effect_on_a_running_serve_is_noted(
    asks: ServeConfig, has: HttpProxies, words: list[str]
) -> None:
    notes = notes_on(asks, has)
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in words)


def test_a_loopback_of_another_machine_is_noted() -> None:
    (note,) = notes_on(config(), proxies(), elsewhere=True)
    assert "127.0.0.1:8000 of the cluster's head" in note
    assert notes_on(config(open=True, host="0.0.0.0"), proxies("0.0.0.0"), elsewhere=True) == []


@pytest.mark.parametrize(
    ("proxied", "ip"),
    [(["head"], "10.0.0.1"), (["head", "mine"], None), (["mine"], None), ([], None), (["gone"], None)],
)
def test_a_proxy_elsewhere_is_found_by_its_machine(
    monkeypatch: pytest.MonkeyPatch, proxied: list[str], ip: str | None
) -> None:
    nodes = {"head": "10.0.0.1", "mine": "10.0.0.2"}
    status = SimpleNamespace(proxies=dict.fromkeys(proxied, "HEALTHY"))
    listed = [{"NodeID": name, "NodeManagerAddress": address} for name, address in nodes.items()]
    monkeypatch.setattr(endpoint, "serve_status", lambda: status)
    monkeypatch.setattr(endpoint.ray, "nodes", lambda: listed)
    monkeypatch.setattr(endpoint.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    assert endpoint._proxy_ip() == ip


def test_no_door_is_opened_for_a_run_whose_keys_are_gone() -> None:
    with pytest.raises(ConfigError, match="begun with keys"):
        start_serve(ServeConfig(api_keys=None))


def test_a_port_that_this_machine_does_not_have_is_named() -> None:
    with pytest.raises(EndpointError, match=r"serve\.host='203\.0\.113\.1'"):
        free_port("203.0.113.1")


def test_a_call_of_serve_ends_though_its_controller_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr("ray.serve.status", silent.wait)
    try:
        with pytest.raises(
            FleetError, match=r"^Ray Serve did not answer within 0.01 s \(wait\); look at its controller"
        ):
            serve_status(0.01)
    finally:
        silent.set()

    def fails() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        within(60.0, fails)
    assert within(60.0, max, 1, 2) == 2


class Serve:
    """Ray Serve as `await_endpoint` sees it: the application is DEPLOYING for so many seconds of a clock that only its
    sleeps move, and answers so long after that.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deploying: float, silent: float) -> None:
        self.now, self.deploying, self.silent = 0.0, deploying, silent
        monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(endpoint, "serve_status", self.status)
        monkeypatch.setattr(endpoint, "_proxies", proxies)
        monkeypatch.setattr(endpoint, "_proxy_ip", lambda: None)
        monkeypatch.setattr(endpoint, "_answers", lambda url: self.now >= deploying + silent)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def status(self) -> Any:
        state = "DEPLOYING" if self.now < self.deploying else "RUNNING"
        app = SimpleNamespace(status=ApplicationStatus(state), message="")
        return SimpleNamespace(applications={"app": app}, proxies={"node": "HEALTHY"})


def test_an_endpoint_that_starts_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Serve(monkeypatch, deploying=600.0, silent=60.0)
    assert await_endpoint("app") == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("deploying", "silent", "words"),
    [(1e9, 0.0, r"not answer after 90\d s \(it is DEPLOYING"), (60.0, 1e9, r"not answer after 18\d s \(it is RUNNING")],
)
def test_an_endpoint_that_does_not_start_or_not_answer_is_an_error_in_the_end(
    monkeypatch: pytest.MonkeyPatch, deploying: float, silent: float, words: str
) -> None:
    Serve(monkeypatch, deploying, silent)
    with pytest.raises(EndpointError, match=words):
        await_endpoint("app")


def other_address() -> str | None:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def ask(url: str, **headers: str) -> tuple[int, Any]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=scaled(30)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def guarded_app(name: str, policy_app: str, store: str, config: ServeConfig, host: str) -> Any:
    """In place of the endpoint: its guard, before a route that answers with what the guard saw."""
    from fastapi import FastAPI, Request
    from ray import serve

    from sampo_ray.serve import errors
    from sampo_ray.serve.middleware.auth import Access, Authentication

    app = FastAPI()
    errors.install(app)
    app.add_middleware(Authentication, access=Access.of(config, host))

    async def peer(request: Request) -> dict[str, Any]:
        return {"peer": request.scope["client"][0], "name": name}

    for path in ("/health", "/v1/models", "/admin/versions"):
        app.add_api_route(path, peer)

    class Guarded: ...

    deployment = serve.deployment(name=name, ray_actor_options={"num_cpus": 0.1})
    return deployment(serve.ingress(app)(Guarded)).bind()


@pytest.fixture
def fresh_serve(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Serve before the test, and none after it; endpoints are `guarded_app`s."""
    from ray import serve

    serve.shutdown()
    monkeypatch.setattr("sampo_ray.serve.gateway.build_endpoint_app", guarded_app)
    yield
    serve.shutdown()


def deployed(name: str, config: ServeConfig, *routes: str) -> str:
    return await_endpoint(name, deploy_endpoint(name, "policy", "store", config, routes or ("/",)))


@pytest.mark.slow
def test_runs_share_the_proxy_of_the_first_even_if_that_serves_nothing(fresh_serve: None) -> None:
    assert start_serve(config(enabled=False, host="0.0.0.0")) == []
    listens = http_proxies()
    assert listens is not None and listens.exist and listens.host == "127.0.0.1" and listens.port != 8000
    assert start_serve(config(enabled=False)) == [] and start_serve(config(port=0)) == []
    (note,) = start_serve(config(host="::1"))
    assert f"127.0.0.1:{listens.port}" in note and "serve.port=8000" in note
    first, second = (deployed(name, config(), "/", f"/{name}") for name in ("a", "b"))
    assert (first, second) == (f"http://127.0.0.1:{listens.port}", f"http://127.0.0.1:{listens.port}/b")
    assert [ask(f"{url}/v1/models")[1]["name"] for url in (first, second)] == ["a", "b"]
    assert deployed("a", config(), "/", "/a") == first, "its own route is not taken"
    with pytest.raises(EndpointError, match="Prefix / is being used by application"):
        deploy_endpoint("c", "policy", "store", config())


@pytest.mark.slow
def test_a_serve_that_others_reach_is_closed_to_runs_without_keys(fresh_serve: None) -> None:
    from ray import serve

    port = free_port("0.0.0.0")
    serve.start(proxy_location="EveryNode", http_options={"host": "0.0.0.0", "port": port})
    begun = time.monotonic()
    with pytest.raises(EndpointError, match=rf"listens on 0\.0\.0\.0:{port}"):
        start_serve(config())
    assert time.monotonic() - begun < scaled(10)
    keyed = config(api_keys=KEYS)
    (note,) = start_serve(keyed)
    assert "serve.host" in note
    url, local = deployed("keyed", keyed, "/keyed"), deployed("forced", config(), "/forced")
    assert ask(f"{url}/v1/models")[0] == 401
    assert ask(f"{url}/v1/models", Authorization="Bearer one")[0] == 200
    assert ask(f"{local}/v1/models", Host="localhost")[0] == 401, "nobody checked, and still it is closed"


@pytest.mark.slow
def test_the_guard_sees_the_peer_of_serves_proxy(fresh_serve: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    address = other_address()
    if address is None or is_loopback(address):
        pytest.skip("this machine has no address besides loopback")
    port = free_port("::")
    serve.start(proxy_location="HeadOnly", http_options={"host": "::", "port": port})
    # An endpoint that takes itself to be out of others' reach.
    monkeypatch.setattr("sampo_ray.serve.endpoint.http_proxies", lambda: proxies("127.0.0.1", port))
    deployed("mistaken", config(), "/mistaken")
    for path in ("/v1/models", "/admin/versions"):
        inside, outside = f"http://127.0.0.1:{port}/mistaken{path}", f"http://{address}:{port}/mistaken{path}"
        assert ask(inside) == (200, {"peer": "::ffff:127.0.0.1", "name": "mistaken"})
        for more in ({}, {"X-Forwarded-For": "127.0.0.1"}):
            status, answer = ask(outside, Host=f"localhost:{port}", **more)
            assert (status, answer["error"]["code"]) == (403, "not_local")


@pytest.mark.slow
def test_serve_without_a_proxy_and_a_port_that_is_taken_are_named_at_once(fresh_serve: None) -> None:
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EndpointError, match=rf"serve\.port={port}: .*Failed to bind"):
            start_serve(config(port=port))
    assert http_proxies() is None, "the next run may choose another port"
    serve.start(proxy_location="Disabled")
    begun = time.monotonic()
    with pytest.raises(EndpointError, match="without an HTTP proxy"):
        start_serve(config())
    assert start_serve(config(enabled=False)) == []
    assert time.monotonic() - begun < scaled(10)
