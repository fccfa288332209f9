"""Ray's private interfaces, checked with Ray 2.60.0."""

import logging
import os

import requests
from ray._private import state
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.job_submission import JobSubmissionClient

from sampo_ray.errors import SubmitError


class LimitedJobClient(JobSubmissionClient):
    """Ray's job client with limits. Overrides `_do_request`, by which all but a log's WebSocket goes.

    Each request has `seconds`, also the constructor's: without them a call waits forever on a server that never
    answers. An upload is at most UPLOAD_BYTES, else SubmitError: to more than that the server answers 413, though Ray's
    own warning comes at 256 MiB and names 512. A proxy in front of the server may take less.
    """

    UPLOAD_BYTES = DASHBOARD_CLIENT_MAX_SIZE

    def __init__(self, address: str, seconds: float) -> None:
        self.request_seconds = seconds
        super().__init__(address)

    def _do_request(
        self, method: str, endpoint: str, *, data: bytes | None = None, **options: object
    ) -> requests.Response:
        size = len(data or b"")
        if size <= self.UPLOAD_BYTES:
            response = super()._do_request(method, endpoint, data=data, timeout=self.request_seconds, **options)
            if response.status_code != requests.codes.request_entity_too_large:
                return response
        limit = f"at most {self.UPLOAD_BYTES >> 20} MiB" if size > self.UPLOAD_BYTES else "less (status 413)"
        raise SubmitError(
            f"the files that travel with the job are {size / 2**20:.1f} MiB zipped, and {self.get_address()} takes "
            f"{limit}; keep what is large on storage that the whole cluster shares"
        )


def allow_slow_start() -> None:
    """Gives Serve's HTTP proxy a minute to start, in a Ray that is started on this machine after this call.

    Serve kills it after 5 s, and gives up after three tries: too early where cores are few and engines start beside it.
    Sets a variable of the environment that Ray does not document.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


def silence_services() -> None:
    """Keeps a thread of `ray._private.services` from complaining of a missing dashboard after `ray.shutdown`."""
    logging.getLogger("ray._private.services").setLevel(logging.CRITICAL)


def gpus_here() -> int:
    """How many GPUs of this machine a Ray that is started here would count. Reaches `ray._private.accelerators`."""
    manager = get_accelerator_manager_for_resource("GPU")
    there, visible = manager.get_current_node_num_accelerators(), manager.get_current_process_visible_accelerator_ids()
    return there if visible is None else min(there, len(visible))


def job_has_ended(job: str) -> bool:
    """Whether the driver of a job (Ray's id, hexadecimal) of this cluster has ended. Reaches `ray._private.state`."""
    return any(each["IsDead"] for each in state.jobs() if each["JobID"] == job)


def failed_health_check(error: Exception) -> Exception:
    """Why Ray Train could not ask a rank how it is: its process ended. Any other error as it is.

    Reaches `ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError`.
    """
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # takes seconds, which `submit` saves

    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
