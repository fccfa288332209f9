"""Request bodies as JSON objects: bounded in size, of finite numbers and valid Unicode. Everything else is a 4xx."""

import json
import math
from typing import NoReturn

from pydantic import JsonValue
from starlette.requests import Request

from sampo_ray.serve.errors import ApiError


async def read_json(request: Request, max_bytes: int) -> dict[str, JsonValue]:
    """The request's body as a JSON object; an empty body is an empty object. Raises ApiError (4xx)."""
    raw = await read_bytes(request, max_bytes)
    return decode(raw) if raw else {}


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The request's body. Raises ApiError (413) if it is announced as, or turns out, longer than `max_bytes`."""
    message = f"body: larger than {max_bytes} bytes, which is all this endpoint takes"
    too_large = ApiError(413, message, code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 20 or int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def decode(raw: bytes) -> dict[str, JsonValue]:
    """The JSON object in `raw`. Raises ApiError (400)."""
    try:
        body: JsonValue = json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(body, ensure_ascii=False).encode()  # fails on lone surrogates, which no tokenizer takes
    except json.JSONDecodeError as error:
        message = f"body: not valid JSON: {error.msg.lower()} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        message = "body: nested too deeply"
    except UnicodeError:
        message = "body: not valid Unicode text"
    except ValueError as error:
        message = f"body: {error}"
    else:
        if isinstance(body, dict):
            return body
        message = "body: must be a JSON object"
    raise ApiError(400, message, code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
