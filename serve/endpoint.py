"""Starting and stopping the live endpoint on a Ray cluster.

One HTTP proxy on the head node serves all runs of a cluster. Serve keeps the address that it is started with: the first
run decides it, or whoever started Serve. So addresses are taken from Serve here, and not from a run's configuration.
Runs differ by route: a run that has the cluster to itself (the laptop) takes `/`, runs that share one take `/<run id>`.
"""

import http.client
import logging
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from sampo_ray.config.serving import ServeConfig, is_loopback
from sampo_ray.errors import EndpointError
from sampo_ray.internals.serve import (
    CALL_S,
    DEPLOY_S,
    HttpProxies,
    delete_app,
    deploy,
    http_proxies,
    serve_status,
    within,
)

POLL_S, HEALTH_TIMEOUT_S = 0.5, 5.0
DEPLOY_TIMEOUT_S, ANSWER_TIMEOUT_S = 900.0, 120.0
"""How long the endpoint's process may take to start, which is a minute on a busy machine (it imports vLLM) and longer
where it waits for a node; and how long it may take to answer from then on.
"""


def start_serve(config: ServeConfig) -> list[str]:
    """Starts Ray Serve with the run's HTTP address, unless it runs already. Returns notes on what the run asks for and
    does not get. Safe to call again.

    Call it before any application is deployed, which would start Serve with defaults. ConfigError for want of keys,
    EndpointError when the port is taken, or when the Serve that runs cannot be used: see `notes_on`.
    """
    config.check_keyed()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    proxies = http_proxies() or _started(config)
    return notes_on(config, proxies, elsewhere=_proxy_ip() is not None) if config.enabled else []


def notes_on(config: ServeConfig, proxies: HttpProxies, elsewhere: bool = False) -> list[str]:
    """What a run that uses `proxies` does not get of what it asks for; `elsewhere`: they run on other machines.

    EndpointError where there is no proxy, or where others reach it and the run neither has keys nor is `open`.
    """
    address, end = _address(proxies.host, proxies.port), "`serve shutdown` ends it, with all that it serves"
    if not proxies.exist:
        raise EndpointError(
            "serve.enabled=true: Ray Serve of this cluster runs without an HTTP proxy, and gets none while it runs; "
            f"set serve.enabled=false, or start anew: {end}"
        )
    if not is_loopback(proxies.host) and not (config.keyed or config.open):
        raise EndpointError(
            f"serve.api_keys: there are none, and Ray Serve of this cluster listens on {address}, which others reach; "
            "set SAMPO_API_KEYS, or serve.keys_file (`sampo keys add`), or serve.open=true to let in whoever reaches "
            "it, or use another cluster"
        )
    unmet = [f"serve.port={config.port}"] if config.port not in (0, proxies.port) else []
    if config.host != proxies.host and not (is_loopback(config.host) and is_loopback(proxies.host)):
        unmet.insert(0, f"serve.host={config.host}")
    notes = [f"Ray Serve runs already: it listens on {address}, not with {' '.join(unmet)}; {end}"] if unmet else []
    if proxies.request_timeout_s and proxies.request_timeout_s < config.request_timeout_s:
        limit, asked = f"{proxies.request_timeout_s:g} s", f"serve.request_timeout_s={config.request_timeout_s:g}"
        notes.append(f"Ray Serve runs already: it ends requests after {limit}, not with {asked}; {end}")
    if elsewhere and is_loopback(proxies.host):
        notes.append(f"the endpoint listens on {address} of the cluster's head, which this machine is not")
    return notes


def _started(config: ServeConfig) -> HttpProxies:
    """Starts Serve. A run that serves nothing starts a proxy as well, on a free port of loopback: without one no later
    run of the cluster could serve anything.
    """
    host, port = (config.host, config.port) if config.enabled else ("127.0.0.1", 0)
    port = port or free_port(host)
    timeout_s = config.request_timeout_s + 10  # the proxy's limit is for requests that never reach the endpoint
    options = {"host": host, "port": port, "request_timeout_s": timeout_s}
    try:
        within(DEPLOY_S, serve.start, proxy_location="HeadOnly", http_options=options)
    except TimeoutError:
        pass  # after a minute, where cores are busy: Serve goes on starting it, and `await_endpoint` has more patience
    except RayError as error:
        within(CALL_S, serve.shutdown)  # it would keep this address
        raise _unusable(port, f"Serve's proxy did not start: {_cause(error)}") from None
    return _proxies()


def check_port(config: ServeConfig) -> None:
    """Raises EndpointError if this machine cannot listen at the endpoint's address."""
    try:
        _listening(config.host, config.port).close()
    except OSError as error:
        reason = f"cannot listen on {config.host} ({error.strerror})"
        raise _unusable(config.port, reason) from None


def free_port(host: str) -> int:
    """A port of this machine on which nothing listens. EndpointError if the machine has no such address."""
    try:
        with _listening(host, 0) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise EndpointError(
            f"serve.host={host!r}: cannot listen on it ({error.strerror}); use an address of this machine"
        ) from None


def deploy_endpoint(name: str, policy_app: str, store: str, config: ServeConfig, routes: Sequence[str] = ("/",)) -> str:
    """Begins to deploy the application `name` in front of `policy_app`, which may still be starting and whose replicas
    follow the weight store `store`. The endpoint outlives the driver.

    Returns its route prefix: the first of `routes` that no other application has. EndpointError when all are taken.
    """
    from sampo_ray.serve.gateway import build_endpoint_app  # imports vLLM, which takes many seconds

    app, reason = build_endpoint_app(name, policy_app, store, config, _proxies().host), ""
    for route in routes:
        try:
            deploy([serve.RunTarget(app, name=name, route_prefix=route)])
            return route
        except TimeoutError:
            return (
                route  # it is deployed; the proxy is not ready after a minute, and `await_endpoint` has more patience
            )
        except RayServeException as error:
            reason = _cause(error)
    raise EndpointError(f"the endpoint could not be deployed: {reason}")


def await_endpoint(name: str, route_prefix: str = "/", look: Callable[[], bool] = bool) -> str:
    """The base URL, to which a client appends `/v1/...`, once the endpoint answers. EndpointError when its deployment
    fails, takes longer than DEPLOY_TIMEOUT_S, or is not followed by an answer within ANSWER_TIMEOUT_S. Time in which
    `look()` does not count: it waits for nodes then.
    """
    proxies, proxy_ip = _proxies(), _proxy_ip()
    begun = deployed = time.monotonic()
    url = base_url(proxies, route_prefix, proxy_ip)
    # Certificates may be for other names, and another machine's loopback is out of reach: then Serve's word counts.
    asks_serve = proxies.tls or (proxy_ip is not None and is_loopback(proxies.host))
    while True:
        now = serve_status()
        if (app := now.applications.get(name)) is None:
            raise EndpointError("the endpoint could not be deployed: it was taken down while it started")
        if app.status == "DEPLOY_FAILED":
            raise EndpointError(f"the endpoint could not be deployed: {app.message}")
        if app.status == "RUNNING" if asks_serve else _answers(url):
            return url
        moment = time.monotonic()
        if look():
            begun = deployed = moment
        if app.status == "DEPLOYING" and moment - begun < DEPLOY_TIMEOUT_S:
            deployed = moment
        elif moment - deployed > ANSWER_TIMEOUT_S or app.status == "DEPLOYING":
            state = f"it is {app.status.value} {app.message}".strip()
            state += f"; Serve's proxies are {', '.join(sorted(now.proxies.values())) or 'not there'}"
            raise EndpointError(f"the endpoint {url} does not answer after {moment - begun:.0f} s ({state})")
        time.sleep(POLL_S)


def stop_endpoint(name: str) -> None:
    """Stops the endpoint once its requests in flight have ended. The policy keeps running."""
    delete_app(name)


def base_url(proxies: HttpProxies, route_prefix: str = "/", proxy_ip: str | None = None) -> str:
    """The URL of what `proxies` serve at a route, for clients on this machine; `proxy_ip`: where they run instead."""
    every = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = proxy_ip or every[proxies.host] if proxies.host in every else proxies.host
    return f"{'https' if proxies.tls else 'http'}://{_address(host, proxies.port)}{route_prefix.rstrip('/')}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unusable(port: int, reason: str) -> EndpointError:
    return EndpointError(f"serve.port={port}: {reason}; choose another port, or 0 for a free one")


def _proxies() -> HttpProxies:
    if (proxies := http_proxies()) is None:
        raise EndpointError("Ray Serve was shut down while the endpoint started; start the run again")
    return proxies


def _proxy_ip() -> str | None:
    """The address of a machine that has one of Serve's proxies; None where this one does."""
    nodes = serve_status().proxies
    if not nodes or ray.get_runtime_context().get_node_id() in nodes:
        return None
    return next((str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] in nodes), None)


def _cause(error: Exception) -> str:
    """An error's message; of one that an actor raised, without the actor's stack."""
    return str(getattr(error, "cause", error))


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without the environment's HTTP proxies
    try:
        with direct.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S):
            return True
    except (OSError, http.client.HTTPException):
        return False


def _listening(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
