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

from sampo_ray.config.serving import ServeConfig
from sampo_ray.errors import EndpointError

POLL_S, START_TIMEOUT_S, HEALTH_TIMEOUT_S = 0.5, 120.0, 5.0


def start_serve(config: ServeConfig) -> None:
    """Starts Ray Serve with the run's HTTP address, unless it runs already; EndpointError when the port is taken.

    Call it before any application is deployed, which would start Serve with defaults. `port` must not be 0.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        return
    if config.enabled:
        check_port(config)
    timeout_s = config.request_timeout_s + 10  # the proxy's limit is for requests that never reach the endpoint
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
    """Begins to deploy the application `name` in front of `policy_app`, which may still be starting and whose replicas
    follow the weight store `store`. The endpoint outlives the driver.
    """
    from sampo_ray.serve.gateway import build_endpoint_app  # imports vLLM, which takes many seconds

    app = build_endpoint_app(name, policy_app, store, config)
    serve.run_many([serve.RunTarget(app, name=name, route_prefix=route_prefix)], wait_for_applications_running=False)


def await_endpoint(name: str, config: ServeConfig, route_prefix: str = "/") -> str:
    """The base URL, to which a client appends `/v1/...`, once the endpoint answers. EndpointError when its deployment
    fails or does not answer within START_TIMEOUT_S.
    """
    url, deadline = base_url(config, route_prefix), time.monotonic() + START_TIMEOUT_S
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
