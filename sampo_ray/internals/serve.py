"""Ray Serve's private interfaces, checked with ray 2.60.0. See internals/serve_llm.py for Serve's LLM deployments."""

import ray
from ray import serve
from ray.serve.handle import DeploymentResponse


def result_ref(response: DeploymentResponse, timeout_s: float) -> ray.ObjectRef:
    """A call's result as an object reference of this process, once a replica has taken the call, within `timeout_s`.

    Reaches `_to_object_ref_sync`: Serve's documented way outside of deployments, underscored because it blocks.
    """
    return response._to_object_ref_sync(_timeout_s=timeout_s)


def begin_delete(app: str) -> None:
    """Begins to take an application down. Reaches the argument `_blocking` of `serve.delete`."""
    serve.delete(app, _blocking=False)
