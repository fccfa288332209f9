"""Ray Serve's private interfaces, checked with ray 2.60.0. See internals/serve_llm.py for Serve's LLM deployments."""

import ray
from ray import serve
from ray.serve.handle import DeploymentResponse


def result_ref(response: DeploymentResponse, timeout_s: float) -> ray.ObjectRef:
    """A call's result as an object reference of this process, to hand on without fetching it.

    Waits up to `timeout_s` for a replica to take the call. Reaches `DeploymentResponse._to_object_ref_sync`: Serve's
    documented way outside of deployments, with an underscore because it blocks.
    """
    return response._to_object_ref_sync(_timeout_s=timeout_s)


def begin_delete(app: str) -> None:
    """Starts to delete an application and returns at once. Reaches the argument `_blocking` of `serve.delete`."""
    serve.delete(app, _blocking=False)
