"""Calling the policy application from the endpoint: its handle by name, whether it runs, and its answers item by item."""

import asyncio
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from sampo_ray.serve import errors

STATUS_FRESH_S = 1.0
STATUS_TIMEOUT_S = 10.0


class PolicyApp:
    """A Serve application of policy replicas, by name; it may start, die and come back while this object lives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: DeploymentHandle | None = None
        self._up, self._looked, self._looking = False, -STATUS_FRESH_S, asyncio.Lock()

    def handle(self) -> DeploymentHandle:
        """Handle for streaming calls; ApiError (503) when the application does not exist."""
        if self._handle is None:
            try:
                self._handle = serve.get_app_handle(self._name).options(stream=True)
            except RayServeException:
                raise errors.unavailable() from None
        return self._handle

    async def is_up(self) -> bool:
        """Whether a replica runs, or Serve would start one for a request. At most one look a second, for all callers."""
        async with self._looking:
            if time.monotonic() - self._looked >= STATUS_FRESH_S:
                try:
                    self._up = await asyncio.wait_for(asyncio.to_thread(self._look), STATUS_TIMEOUT_S)
                except (TimeoutError, RayError):
                    pass  # the controller restarts; replicas answer without it, so what was known last still counts
                self._looked = time.monotonic()
        return self._up

    def _look(self) -> bool:
        app = serve.status().applications.get(self._name)
        if app is None:
            return False
        return all(d.status == "HEALTHY" or d.replica_states.get("RUNNING", 0) > 0 for d in app.deployments.values())
