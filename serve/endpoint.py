"""Starting and stopping the live endpoint on a Ray cluster.

One HTTP proxy on the head node serves all runs of a cluster; the first run decides its address. Runs differ by route: a
run that has the cluster to itself (the laptop) takes `/`, runs that share one take `/<run id>`.
"""

import http.client
import logging
import socket
import time
import urllib.request

from ray import serve

from sampo_ray.config.sections import ServeConfig
from sampo_ray.errors import EndpointError

POLL_S = 0.5
START_TIMEOUT_S = 120.0
HEALTH_TIMEOUT_S = 5.0
PROXY_MARGIN_S = 10.0
"""How much longer than the endpoint Serve's proxy waits: its limit is for requests that never reach the endpoint."""


def start_serve(config: ServeConfig) -> None:
    """Starts Ray Serve with the run's HTTP address, unless Serve runs already.

    Call it before any application is deployed, which would start Serve with defaults. `port` must not be 0 (see
    `free_port`). Raises EndpointError when the port is taken.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        return
    if config.enabled:
        check_port(config)
    timeout_s = config.request_timeout_s + PROXY_MARGIN_S
    serve.start(
        proxy_location="HeadOnly" if config.enabled else "Disabled",
        http_options={"host": config.host, "port": config.port, "request_timeout_s": timeout_s},
    )


def check_port(config: ServeConfig) -> None:
    """Raises EndpointError if this machine cannot listen at the endpoint's address."""
    try:
        _listening(config.host, config.port).close()
    except OSError as error:
        reason = f"cannot listen on {config.host} ({error.strerror})"
        raise EndpointError(f"serve.port={config.port}: {reason}; choose another port, or 0 for a free one") from None


def free_port(host: str) -> int:
    """A port of this machine on which nothing listens."""
    with _listening(host, 0) as server:
        return server.getsockname()[1]


def deploy_endpoint(name: str, policy_app: str, store: str, config: ServeConfig, route_prefix: str = "/") -> None:
    """Begins to deploy the endpoint as the application `name`, in front of the application `policy_app`, whose replicas
    follow the weight store `store`. The policy may still be starting. The endpoint outlives the driver.
    """
    from sampo_ray.serve.gateway import build_endpoint_app  # imports vLLM, which takes many seconds

    target = serve.RunTarget(build_endpoint_app(name, policy_app, store, config), name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def await_endpoint(name: str, config: ServeConfig, route_prefix: str = "/") -> str:
    """Waits until a deployed endpoint answers; returns its base URL, to which a client appends `/v1/...`.

    Raises EndpointError when the deployment fails or does not answer within START_TIMEOUT_S.
    """
    url = base_url(config, route_prefix)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(url):
        status = serve.status().applications[name]
        if status.status == "DEPLOY_FAILED":
            raise EndpointError(f"the endpoint could not be deployed: {status.message}")
        if time.monotonic() > deadline:
            state = f"{status.status.value} {status.message}".strip()
            raise EndpointError(f"the endpoint {url} does not answer after {START_TIMEOUT_S:.0f} s (it is {state})")
        time.sleep(POLL_S)
    return url


def stop_endpoint(name: str) -> None:
    """Stops the endpoint once its requests in flight have ended. The policy keeps running."""
    serve.delete(name)


def base_url(config: ServeConfig, route_prefix: str = "/") -> str:
    """The endpoint's URL for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{config.port}{route_prefix.rstrip('/')}"


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without the environment's HTTP proxies
    try:
        with direct.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S):
            return True
    except (OSError, http.client.HTTPException):
        return False


def _listening(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
