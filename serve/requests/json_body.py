"""Request bodies as JSON objects: bounded in size, of finite numbers and valid Unicode. Everything else is a 4xx.

Also limits on the size of the constraints that a body puts on the answer: JSON schemas and choices, and no others. The
replica tries what they cost (actors/policy/constraints.py).
"""

import json
import math
from collections.abc import Iterator
from typing import NoReturn

from pydantic import JsonValue
from starlette.requests import Request

from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.requests.schemas import overlooked

MAX_VALUES, MAX_CHARACTERS, MAX_DEPTH, MAX_TOOLS = 1000, 20_000, 32, 64
ACCEPTED = ("json", "choice", "json_object", "disable_any_whitespace", "disable_additional_properties")


async def read_json(request: Request, max_bytes: int) -> dict[str, JsonValue]:
    """The request's body as a JSON object; an empty body is an empty object. Raises ApiError (4xx)."""
    return decode(await read_bytes(request, max_bytes) or b"{}")


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The request's body. Raises ApiError (413) if it is announced as, or turns out, longer than `max_bytes`."""
    message = f"body: larger than {max_bytes} bytes, which is all this endpoint takes"
    too_large, body = ApiError(413, message, code="body_too_large"), bytearray()
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 20 or int(announced) > max_bytes:
        raise too_large
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


def check_constraints(body: dict[str, JsonValue]) -> None:
    """Raises ApiError (400), naming the field, for a request body with constraints beyond the limits.

    vLLM's models must not see the body before: they take some constraints apart while they validate.
    """
    outputs = _mapping(body.get("structured_outputs"))
    for field in outputs:
        if field not in ACCEPTED and outputs[field] is not None:
            raise refused(f"structured_outputs.{field}"[:100], "not accepted by this endpoint; use json or choice")
    _check_size(outputs.get("choice"), "structured_outputs.choice")
    _check_schema(outputs.get("json"), "structured_outputs.json")
    form = _mapping(body.get("response_format"))
    if form.get("type") not in (None, "text", "json_object", "json_schema"):
        raise refused("response_format.type", "must be text, json_object or json_schema")
    given = _mapping(form.get("json_schema"))
    for name in ("schema", "json_schema"):  # vLLM takes both names
        _check_schema(given.get(name), f"response_format.json_schema.{name}", given.get("strict") is not False)
    tools, must_call = body.get("tools"), body.get("tool_choice") not in (None, "auto", "none")
    if isinstance(tools, list):
        if len(tools) > MAX_TOOLS:
            raise refused("tools", f"{len(tools)} are more than the {MAX_TOOLS} that this endpoint takes")
        for position, tool in enumerate(tools):
            parameters = _mapping(_mapping(tool).get("function")).get("parameters")
            _check_schema(parameters, f"tools[{position}].function.parameters", must_call)


def refused(field: str, reason: str) -> ApiError:
    return ApiError(400, f"{field}: {reason}", param=field)


def _mapping(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _check_schema(schema: JsonValue, field: str, holds: bool = True) -> None:
    """`holds`: whether the answer has to keep to all of the schema, rather than as far as it can."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise refused(field, "not valid JSON") from None
    _check_size(schema, field)
    if holds and (reason := overlooked(schema)):
        raise refused(field, reason)


def _check_size(tree: JsonValue, field: str) -> None:
    characters = 0
    for count, (value, depth) in enumerate(_walk(tree), 1):
        characters += len(value) if isinstance(value, str) else 0
        sizes = (count, MAX_VALUES, "values"), (characters, MAX_CHARACTERS, "characters"), (depth, MAX_DEPTH, "levels")
        for size, limit, noun in sizes:
            if size > limit:
                raise refused(field, f"more than the {limit} {noun} that this endpoint takes")


def _walk(tree: JsonValue) -> Iterator[tuple[JsonValue, int]]:
    """Every value and every name in the tree with its depth; not recursive, since the tree may be very deep."""
    pending = [(tree, 1)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        if isinstance(value, dict):
            pending.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            pending.extend((item, depth + 1) for item in value)
