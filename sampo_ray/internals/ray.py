"""Ray's private interfaces, checked with Ray 2.60.0."""

import logging

import requests
from ray.job_submission import JobSubmissionClient


class TimeLimitedJobClient(JobSubmissionClient):
    """Ray's job client with a limit of `seconds` for each request, also its constructor's: without one, a call waits
    forever on a server that never answers. Overrides `_do_request`, by which all but a log's WebSocket goes.
    """

    def __init__(self, address: str, seconds: float) -> None:
        self.request_seconds = seconds
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **options: object) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=self.request_seconds, **options)


def silence_services() -> None:
    """Keeps a thread of `ray._private.services` from complaining of a missing dashboard after `ray.shutdown`."""
    logging.getLogger("ray._private.services").setLevel(logging.CRITICAL)
