"""The live endpoint under invalid requests, and after its policy is deleted: the last tests of this folder."""

import os
import time
from collections import Counter
from functools import cache

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from ray import serve

from sampo_ray.serve.middleware.headers import SECURITY_HEADERS
from tests.endpoint import fuzzing
from tests.endpoint.live import Endpoint, get, message
from tests.waiting import scaled

pytestmark = pytest.mark.slow

SEEN: Counter[int] = Counter()


@cache
def fields(route: str) -> dict[str, str]:
    """The annotations of a request's fields by name."""
    from sampo_ray.serve.requests.openai import ChatCompletionRequest, CompletionRequest

    kind = ChatCompletionRequest if route.endswith("chat/completions") else CompletionRequest
    return {name: str(field.annotation) for name, field in kind.model_fields.items()}


# SAMPO_FUZZ=10000 for a long run.
@settings(max_examples=int(os.environ.get("SAMPO_FUZZ", "300")), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_makes_the_endpoint_fail(endpoint: Endpoint, data: st.DataObject) -> None:
    request = data.draw(fuzzing.raw_requests("/limited", ("use-key", "admin-key"), fields))
    started = time.monotonic()
    status, headers, text = fuzzing.send(endpoint.limited, request.raw("127.0.0.1"))
    seconds = time.monotonic() - started
    SEEN[status] += 1
    event(f"{status}" if status else "closed without an answer")  # --hypothesis-show-statistics counts them
    assert not fuzzing.problem(request, status, headers, text), f"{request}: {status} {text[:300]}"
    assert seconds < scaled(45), f"{request}: {status} after {seconds:.0f} s"
    if status >= 400 and headers.get("content-type") == "application/json":
        assert headers.items() >= SECURITY_HEADERS.items()


def test_the_requests_met_all_kinds_of_answers(endpoint: Endpoint) -> None:
    assert {200, 400, 401, 403, 404, 405} <= set(SEEN)
    assert endpoint.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_health_and_answers_are_503_when_the_policy_is_gone(endpoint: Endpoint) -> None:
    serve.delete("test-policy")
    answers = [endpoint.post("completions", {"prompt": "x"}), get(f"{endpoint.url}/health")]
    for answer in answers:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "not available" in message(answer)
