"""Starting and stopping the live endpoint on a Ray cluster.

One HTTP proxy, on the head node, serves all runs of a cluster; whoever comes first decides its address. Routes tell
runs apart: a run that has the cluster to itself (the laptop) takes `/`, runs that share one take `/<run id>`.
"""

import http.client
import logging
import socket
import time
import urllib.request

from ray import serve

from sampo_ray.config.serve import ServeConfig
from sampo_ray.errors import EndpointError

POLL_S = 0.5


def start_serve(config: ServeConfig) -> None:
    """Starts Ray Serve with the run's HTTP address. Call it before any application is deployed, which would start Serve
    with other defaults. On a cluster where Serve runs already nothing changes. `port` must not be 0 (see `free_port`).

    Raises EndpointError when the port is taken.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        return
    if config.enabled:
        check_port(config)
    serve.start(
        proxy_location="HeadOnly" if config.enabled else "Disabled",
        # The endpoint keeps its own time; this is for requests that never reach it.
        http_options={"host": config.host, "port": config.port, "request_timeout_s": config.request_timeout_s + 10},
    )


def check_port(config: ServeConfig) -> None:
    """EndpointError if the endpoint could not listen at its address on this machine."""
    try:
        _listening(config.host, config.port).close()
    except OSError as error:
        reason = f"cannot listen on {config.host} ({error.strerror})"
        raise EndpointError(f"serve.port={config.port}: {reason}; choose another port, or 0 for a free one") from None


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on."""
    with _listening(host, 0) as server:
        return server.getsockname()[1]


def start_endpoint(
    name: str, policy_app: str, store: str, config: ServeConfig, route_prefix: str = "/", timeout_s: float = 120.0
) -> str:
    """Deploys the endpoint as the application `name`, in front of the running application `policy_app`, whose replicas
    follow the weight store of that name.

    Returns its base URL (a client appends `/v1/...`) once it answers. It outlives the driver. EndpointError if it
    does not answer within `timeout_s`.
    """
    deploy_endpoint(name, policy_app, store, config, route_prefix)
    return await_endpoint(name, config, route_prefix, timeout_s)


def deploy_endpoint(name: str, policy_app: str, store: str, config: ServeConfig, route_prefix: str) -> None:
    """Begins to start the endpoint; its policy may still be starting itself."""
    from sampo_ray.serve.gateway import build_endpoint_app  # brings vLLM in, which takes many seconds

    target = serve.RunTarget(build_endpoint_app(name, policy_app, store, config), name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def await_endpoint(name: str, config: ServeConfig, route_prefix: str, timeout_s: float = 120.0) -> str:
    """The base URL of a deployed endpoint, once it answers; EndpointError when it does not within `timeout_s`."""
    url = base_url(config, route_prefix)
    deadline = time.monotonic() + timeout_s
    while not _answers(url):
        status = serve.status().applications[name]
        if status.status == "DEPLOY_FAILED":
            raise EndpointError(f"the endpoint could not be deployed: {status.message}")
        if time.monotonic() > deadline:
            state = f"{status.status.value} {status.message}".strip()
            raise EndpointError(f"the endpoint {url} does not answer after {timeout_s:.0f} s (it is {state})")
        time.sleep(POLL_S)
    return url


def stop_endpoint(name: str) -> None:
    """Takes the endpoint down; requests in flight end first. The policy stays."""
    serve.delete(name)


def base_url(config: ServeConfig, route_prefix: str = "/") -> str:
    """Where a client on this machine finds the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{config.port}{route_prefix.rstrip('/')}"


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # proxies of the environment do not know it
    try:
        with direct.open(f"{url}/health", timeout=5.0):
            return True
    except (OSError, http.client.HTTPException):
        return False


def _listening(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
