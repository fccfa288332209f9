"""Reading request bodies: from the bytes of a stranger to a request for a policy replica, or an ApiError."""

import json
import math
from typing import Any, NoReturn, TypeVar, cast

from pydantic import ValidationError
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.requests import Request
from vllm.exceptions import VLLMClientError

from sampo_ray.serve.errors import ApiError, from_validation

REFUSED_FIELDS = (
    # These would change the prompt format that the policy is trained in,
    "chat_template",
    "chat_template_kwargs",
    "documents",
    # load data that the user names or brings,
    "prompt_embeds",
    "media_io_kwargs",
    "mm_processor_kwargs",
    # or reach into the engine.
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "priority",
)

PolicyRequest = TypeVar("PolicyRequest", ChatCompletionRequest, CompletionRequest)

# vLLM's validators compare raw values and take them apart before their types are checked.
WRONG_TYPES = (TypeError, AttributeError, KeyError, OverflowError, RecursionError)


async def read(request: Request, kind: type[PolicyRequest], max_bytes: int) -> PolicyRequest:
    """The request's body as `kind`. Raises ApiError (4xx)."""
    body = decode(await _bytes(request, max_bytes))
    for field in REFUSED_FIELDS:
        if body.get(field) is not None:
            raise ApiError(400, f"{field}: not accepted by this endpoint; leave it out", param=field)
    return _validated(body, kind)


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object; an empty body is an empty one. Raises ApiError (4xx)."""
    raw = await _bytes(request, max_bytes)
    return decode(raw) if raw else {}


def decode(raw: bytes) -> dict[str, Any]:
    """JSON object of finite numbers and encodable text; anything else is an ApiError (400)."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no tokenizer takes it
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"body: not valid JSON: {error.msg.lower()} at {where}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "body: nested too deeply", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "body: not valid Unicode text", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"body: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "body: must be a JSON object", code="invalid_json")
    return body


async def _bytes(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(
        413, f"body: larger than {max_bytes} bytes, which is all this endpoint takes", code="body_too_large"
    )
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _validated(body: dict[str, Any], kind: type[PolicyRequest]) -> PolicyRequest:
    if issubclass(kind, ChatCompletionRequest):
        _check_messages(body.get("messages"))
    try:
        parsed = kind.model_validate(body)
        if isinstance(parsed, ChatCompletionRequest):
            _settle(parsed)
        return parsed
    except ValidationError as error:
        raise from_validation(error) from None
    except VLLMClientError as error:
        message = Exception.__str__(error)  # its own form adds the value
        raise ApiError(400, message, param=getattr(error, "parameter", None)) from None
    except WRONG_TYPES:
        field = _culprit(body, kind)
        raise ApiError(400, f"{field or 'body'}: has a value of the wrong type", param=field) from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: must be a list of at least one message", param="messages")
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{field}: must be an object with role and content", param=field)
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"{field}.role: must be a string", param=f"{field}.role")
        content = message.get("content")
        if not _is_text(content) and not (content is None and message.get("tool_calls")):
            wanted = "must be text, or a list of parts of type 'text'"
            raise ApiError(400, f"{field}.content: {wanted}", param=f"{field}.content")


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return isinstance(content, str)


def _settle(request: ChatCompletionRequest) -> None:
    """Draws out pydantic's lazy iterators, which could not travel to a replica; their checks happen only now."""
    for message in cast(list[dict[str, Any]], request.messages):
        for field in ("content", "tool_calls"):
            if message.get(field) is not None and not isinstance(message[field], str):
                message[field] = list(message[field])


def _culprit(body: dict[str, Any], kind: type[PolicyRequest]) -> str | None:
    """The field without which the body's types are right."""
    for field in body:
        try:
            kind.model_validate({key: value for key, value in body.items() if key != field})
        except WRONG_TYPES:
            continue
        except (ValidationError, VLLMClientError):
            pass
        return field
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
