"""Ray Serve's private interfaces, checked with ray 2.60.0. See internals/serve_llm.py for Serve's LLM deployments."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import ServeStatus

from sampo_ray.errors import FleetError

T = TypeVar("T")
CALL_S, DEPLOY_S, DELETE_S = 120.0, 300.0, 120.0


@dataclass(frozen=True)
class HttpProxies:
    """How the HTTP proxies of a cluster's Serve listen, each on the node where it runs."""

    host: str
    port: int
    location: str  # "HeadOnly", "EveryNode", or "Disabled" where there are none
    tls: bool = False
    request_timeout_s: float | None = None

    @property
    def exist(self) -> bool:
        return self.location != "Disabled"


def http_proxies() -> HttpProxies | None:
    """How the HTTP proxies of this cluster's Serve listen; None where Serve does not run.

    Reaches `_get_global_client`, its `http_config`, and the controller's `get_proxy_location`. `serve.status()` has no
    addresses, and what the dashboard shows of one that was not set is another default than the proxies have.
    """
    if (client := within(CALL_S, _get_global_client, raise_if_no_controller_running=False)) is None:
        return None
    options = client.http_config
    try:
        location = ray.get(client._controller.get_proxy_location.remote(), timeout=CALL_S).value
    except ActorDiedError:  # another process has shut Serve down since this one looked first
        return None
    tls, timeout_s = bool(options.ssl_certfile), options.request_timeout_s
    return HttpProxies(options.host or "", options.port, location, tls, timeout_s)


def result_ref(response: DeploymentResponse, timeout_s: float) -> ray.ObjectRef:
    """A call's result as an object reference of this process, once a replica has taken the call, within `timeout_s`.

    Reaches `_to_object_ref_sync`: Serve's documented way outside of deployments, underscored because it blocks.
    """
    return response._to_object_ref_sync(_timeout_s=timeout_s)


def within(timeout_s: float, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What a call of Serve's own returns or raises: most have no time limit, and wait for ever for a controller that
    hangs. FleetError after `timeout_s`; the call then stays in a thread of its own."""
    future = Future[T]()

    def work() -> None:
        try:
            future.set_result(call(*arguments, **options))
        except BaseException as error:  # of any kind, for it is raised where the call was made
            future.set_exception(error)

    threading.Thread(target=work, name="serve-call", daemon=True).start()
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():  # Serve's own
            raise
        raise FleetError(
            f"Ray Serve did not answer within {timeout_s:g} s ({getattr(call, '__name__', call)}); look at its "
            "controller with `serve status` and in Ray's logs"
        ) from None


def serve_status(timeout_s: float = CALL_S) -> ServeStatus:
    """What Serve runs; nothing where it does not run. FleetError when its controller does not answer."""
    return within(timeout_s, serve.status)


def app_handle(app: str, timeout_s: float = CALL_S) -> DeploymentHandle:
    """The handle of an application, which must be deployed."""
    return within(timeout_s, serve.get_app_handle, app)


def deploy(targets: Sequence[serve.RunTarget]) -> list[DeploymentHandle]:
    """Begins to deploy applications, without waiting for them to run."""
    return within(DEPLOY_S, serve.run_many, list(targets), wait_for_applications_running=False)


def delete_app(app: str) -> None:
    """Takes an application down, and returns when it is gone; TimeoutError where that takes longer than a minute."""
    within(DELETE_S, serve.delete, app)


def begin_delete(app: str) -> None:
    """Begins to take an application down. Reaches the argument `_blocking` of `serve.delete`."""
    within(CALL_S, serve.delete, app, _blocking=False)


def bundles_of(app: serve.Application) -> tuple[dict[str, float], ...]:
    """What one replica of an application asks Ray for: the bundles of its placement group, else one for itself.

    Reaches `_bound_deployment` and its `_replica_config`.
    """
    config = app._bound_deployment._replica_config
    if config.placement_group_bundles:
        return tuple(dict(each) for each in config.placement_group_bundles)
    options = config.ray_actor_options
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return ({name: float(options.get(option) or 0) for name, option in names.items()},)
