"""Limits on the constraints that a request puts on its answer: JSON schemas of moderate size and choices, no others.

A few threads of the engine compile constraints, without a time limit. Ten characters of a regular expression or two
kilobytes of a grammar keep a thread busy for many seconds with a vocabulary of 128,000 tokens (measured with xgrammar),
and then no request's constraints are compiled.
"""

import json
from collections.abc import Iterator

from pydantic import JsonValue

from sampo_ray.serve.errors import ApiError

MAX_VALUES = 1000
MAX_CHARACTERS = 20_000
MAX_DEPTH = 32
MAX_TOOLS = 64
DEFINITIONS = ("$defs", "definitions")
PATTERNS = ("pattern", "patternProperties", "propertyNames")
BOUNDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
ACCEPTED = ("json", "choice", "json_object", "disable_any_whitespace", "disable_additional_properties")


def check(body: dict[str, JsonValue]) -> None:
    """Raises ApiError (400), naming the field, for a request body with constraints beyond the limits.

    Call it before vLLM's models see the body: they compile constraints while they validate. Values of a wrong type pass
    here and are refused there.
    """
    outputs = _mapping(body.get("structured_outputs"))
    for field in outputs:
        if field not in ACCEPTED and outputs[field] is not None:
            name = f"structured_outputs.{field}"[:100]
            raise _refused(name, "not accepted by this endpoint; use json or choice")
    _check_size(outputs.get("choice"), "structured_outputs.choice")
    _check_schema(outputs.get("json"), "structured_outputs.json")
    form = _mapping(body.get("response_format"))
    if form.get("type") not in (None, "text", "json_object", "json_schema"):
        raise _refused("response_format.type", "must be text, json_object or json_schema")
    for name in ("schema", "json_schema"):  # vLLM takes both names
        _check_schema(_mapping(form.get("json_schema")).get(name), f"response_format.json_schema.{name}")
    tools = body.get("tools")
    if isinstance(tools, list):
        if len(tools) > MAX_TOOLS:
            raise _refused("tools", f"{len(tools)} are more than the {MAX_TOOLS} that this endpoint takes")
        for position, tool in enumerate(tools):
            parameters = _mapping(_mapping(tool).get("function")).get("parameters")
            _check_schema(parameters, f"tools[{position}].function.parameters")


def _refused(field: str, reason: str) -> ApiError:
    return ApiError(400, f"{field}: {reason}", param=field)


def _mapping(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}


def _check_schema(schema: JsonValue, field: str) -> None:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise _refused(field, "not valid JSON") from None
    _check_size(schema, field)
    _check_references(schema, field)
    for value, _ in _walk(schema):
        mapping = _mapping(value)
        used = next((name for name in PATTERNS if name in mapping), None)
        # A property may be called "pattern"; its value is then a schema.
        if used and not (used == "pattern" and isinstance(mapping[used], dict)):
            raise _refused(field, f"{used} is not accepted by this endpoint; use enum or format")
        for name in BOUNDS:  # the engine finds a negative bound only when it compiles
            if isinstance(bound := mapping.get(name), int | float) and bound < 0:
                raise _refused(field, f"{name} must not be negative")


def _check_size(tree: JsonValue, field: str) -> None:
    characters = 0
    for count, (value, depth) in enumerate(_walk(tree), 1):
        characters += len(value) if isinstance(value, str) else 0
        sizes = {
            "values": (count, MAX_VALUES),
            "characters": (characters, MAX_CHARACTERS),
            "levels": (depth, MAX_DEPTH),
        }
        for noun, (size, limit) in sizes.items():
            if size > limit:
                raise _refused(field, f"more than the {limit} {noun} that this endpoint takes")


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


def _check_references(schema: JsonValue, field: str) -> None:
    """Refuses references to anything but the schema's own definitions, and definitions that consist of references to
    themselves only: the engine accepts those, then fails on every use."""
    definitions = {
        f"#/{section}/{name}": definition
        for section in DEFINITIONS
        for name, definition in _mapping(_mapping(schema).get(section)).items()
    }
    for value, _ in _walk(schema):
        reference = _mapping(value).get("$ref")
        if isinstance(reference, str) and reference not in definitions:
            raise _refused(field, "$ref must name one of the schema's own $defs")
    for start in definitions:
        seen, pending = set(), _bare_references(definitions[start])
        while pending:
            if (reference := pending.pop()) == start:
                raise _refused(field, "a definition refers to nothing but itself")
            if reference not in seen:
                seen.add(reference)
                pending.extend(_bare_references(definitions[reference]))


def _bare_references(schema: JsonValue) -> list[str]:
    """References that a schema consists of, directly or within anyOf, oneOf and allOf."""
    found, pending = list[str](), [schema]
    while pending:
        value = _mapping(pending.pop())
        if isinstance(reference := value.get("$ref"), str):
            found.append(reference)
        for combined in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := value.get(combined), list):
                pending.extend(parts)
    return found
