"""The endpoint's errors: JSON in OpenAI's form, without stack traces, paths or values of a request."""

import re
from collections.abc import Mapping

from fastapi import FastAPI, Request
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sampo_ray.errors import PausedError
from sampo_ray.serve.middleware.headers import SECURITY_HEADERS

RETRY_AFTER_S, PAUSED_RETRY_S = 2, 30
NO_ROUTE = "no such route; this endpoint has POST /v1/chat/completions, POST /v1/completions and GET /v1/models"
OPTIONS = re.compile(r"(?<![\w-])--[a-z][a-z-]+|\b(?:VLLM|RAY)_[A-Z]+")  # of another program, or its environment
VALUE = re.compile(r" \((?:parameter|value)=.*\)$", re.DOTALL)  # what vLLM adds to its messages
FIELD = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
TYPES = frozenset({"str", "int", "float", "bool", "list", "dict"})


class ApiError(Exception):
    """An answer with an HTTP `status` of 400 or more, a message, and the request's field that it is about (`param`)."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_s: int = RETRY_AFTER_S
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self._retry_s = status, message, param, code, retry_s

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"retry-after": str(self._retry_s)}
        if self.status == 504:
            return {"x-should-retry": "false"}  # OpenAI's clients would ask for all of it twice more
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers={**self.headers, **(headers or {})})


class ReplicaLost(ApiError):
    """A replica failed before its answer began; another replica may be asked."""

    def __init__(self) -> None:
        super().__init__(503, "the policy is not available just now; try again soon", code="policy_unavailable")


def unavailable(reason: str = "the policy is not available just now; try again soon") -> ApiError:
    return ApiError(503, reason, code="policy_unavailable")


def paused() -> ApiError:
    """The policy's GPUs are in use by the training ranks, for minutes at least."""
    message = "the policy is paused while its GPUs train it; try again later"
    return ApiError(503, message, code="policy_paused", retry_s=PAUSED_RETRY_S)


def from_engine(status: int, message: str, param: str | None = None) -> ApiError:
    """The engine answered with an error: a 4xx stays as it is, 501 (not implemented) becomes 400, the rest 503.

    Values are left out, and where its message tells its operator which options to start it with, so is that.
    """
    if status >= 500 and status != 501:
        return ReplicaLost()
    message = VALUE.sub("", message)
    if OPTIONS.search(message):
        named = FIELD.search(message)
        param = param or (named[0] if named else None)
        message = f"{param or 'body'}: this endpoint is not set up for it; leave it out"
    return ApiError(400 if status == 501 else status, message, param=param)


def from_policy(error: RayError | RayServeException) -> ApiError:
    """A call of a policy replica failed: the replica is gone, dying, or paused, or its queue is full."""
    if isinstance(error, PausedError):  # Ray's error is of its cause's class, too
        return paused()
    if isinstance(error, BackPressureError):
        return ApiError(429, "the policy has as many requests as it can queue; try again soon", code="queue_full")
    return ReplicaLost()


def from_validation(error: ValidationError) -> ApiError:
    """The first invalid field of a request body. Its value is left out, since it may be a prompt."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # The path of a union names the types of its alternatives as well; the user knows only fields and positions.
    path = [
        p for p in first["loc"] if isinstance(p, int) or (p.isidentifier() and not p[0].isupper() and p not in TYPES)
    ]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")[:100]
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field or 'body'}: {message[:1].lower()}{message[1:]}", param=field or None)


def install(app: FastAPI) -> None:
    """Makes `app` answer every error in this form, also its own 404 and 405."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        # request.url would parse the Host header, which may hold anything.
        messages = {404: f"{request.method} {request.scope['path']}: {NO_ROUTE}", 405: "method not allowed here"}
        message = messages.get(error.status_code, "the request was refused")
        return ApiError(error.status_code, message).response(error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        failure = ApiError(500, "the endpoint failed in a way it did not expect", code="internal_error")
        return failure.response(SECURITY_HEADERS)  # sent by Starlette from outside of the middleware
