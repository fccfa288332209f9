"""What a request may ask the engine to compile: constraints on the form of an answer.

They are compiled by a few threads of the engine, with no time limit. Ten characters of a regular expression or two
kilobytes of a grammar are enough to keep one busy for many seconds with a vocabulary of 128,000 tokens (measured with
xgrammar), and then nobody's constraints are compiled. So: JSON schemas of moderate size and choices, nothing else.
"""

import json
from collections.abc import Iterator
from typing import Any

from sampo_ray.serve.errors import ApiError

MAX_VALUES = 1000
MAX_CHARACTERS = 20_000
MAX_DEPTH = 32
MAX_TOOLS = 64
DEFINITIONS = ("$defs", "definitions")
PATTERNS = ("pattern", "patternProperties", "propertyNames")
BOUNDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
ACCEPTED = ("json", "choice", "json_object", "disable_any_whitespace", "disable_additional_properties")


def check(body: dict[str, Any]) -> None:
    """ApiError (400), naming the field, for a request body that asks for more.

    Comes before anything else looks at the body, since vLLM's models compile while they validate; what has a wrong type
    is left to them.
    """
    outputs = _mapping(body.get("structured_outputs"))
    for field in outputs:
        if field not in ACCEPTED and outputs[field] is not None:
            where = f"structured_outputs.{field}"[:100]
            raise ApiError(400, f"{where}: not accepted by this endpoint; use json or choice", param=where)
    _check_size(outputs.get("choice"), "structured_outputs.choice")
    _check_schema(outputs.get("json"), "structured_outputs.json")
    form = _mapping(body.get("response_format"))
    if form.get("type") not in (None, "text", "json_object", "json_schema"):
        message = "response_format.type: must be text, json_object or json_schema"
        raise ApiError(400, message, param="response_format.type")
    for name in ("schema", "json_schema"):  # vLLM takes both names
        _check_schema(_mapping(form.get("json_schema")).get(name), f"response_format.json_schema.{name}")
    tools = body.get("tools")
    if not isinstance(tools, list):
        return
    if len(tools) > MAX_TOOLS:
        raise ApiError(
            400, f"tools: {len(tools)} are more than the {MAX_TOOLS} that this endpoint takes", param="tools"
        )
    for position, tool in enumerate(tools):
        parameters = _mapping(_mapping(tool).get("function")).get("parameters")
        _check_schema(parameters, f"tools[{position}].function.parameters")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _check_schema(schema: Any, field: str) -> None:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ApiError(400, f"{field}: not valid JSON", param=field) from None
    _check_size(schema, field)
    _check_references(schema, field)
    for value, _ in _walk(schema):
        used = next((name for name in PATTERNS if isinstance(value, dict) and name in value), None)
        # A property may be called "pattern"; then what stands there is a schema.
        if used and not (used == "pattern" and isinstance(value[used], dict)):
            raise ApiError(400, f"{field}: {used} is not accepted by this endpoint; use enum or format", param=field)
        for name in BOUNDS:  # below zero they are noticed only when the engine compiles
            if isinstance(bound := _mapping(value).get(name), int | float) and bound < 0:
                raise ApiError(400, f"{field}: {name} must not be negative", param=field)


def _check_size(tree: Any, field: str) -> None:
    characters = 0
    for count, (value, depth) in enumerate(_walk(tree), 1):
        characters += len(value) if isinstance(value, str) else 0
        for measure, limit, noun in (
            (count, MAX_VALUES, "values"),
            (characters, MAX_CHARACTERS, "characters"),
            (depth, MAX_DEPTH, "levels"),
        ):
            if measure > limit:
                raise ApiError(400, f"{field}: more than the {limit} {noun} that this endpoint takes", param=field)


def _walk(tree: Any) -> Iterator[tuple[Any, int]]:
    """Every value and every name in the tree with its depth; without recursion, as deep as it may be."""
    left = [(tree, 1)]
    while left:
        value, depth = left.pop()
        yield value, depth
        if isinstance(value, dict):
            left.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            left.extend((item, depth + 1) for item in value)


def _check_references(schema: Any, field: str) -> None:
    """Refuses references outside of the schema's own definitions, and definitions that are made of themselves by
    references alone: the engine takes those, and fails on them again and again."""
    named = {
        f"#/{where}/{name}": inner
        for where in DEFINITIONS
        for name, inner in _mapping(_mapping(schema).get(where)).items()
    }
    for value, _ in _walk(schema):
        reference = _mapping(value).get("$ref")
        if isinstance(reference, str) and reference not in named:
            raise ApiError(400, f"{field}: $ref must name one of the schema's own $defs", param=field)
    for start in named:
        seen, left = set(), _bare_references(named[start])
        while left:
            if (reference := left.pop()) == start:
                raise ApiError(400, f"{field}: a definition is made of nothing but itself", param=field)
            if reference not in seen:
                seen.add(reference)
                left.extend(_bare_references(named[reference]))


def _bare_references(schema: Any) -> list[str]:
    """What a schema refers to without anything around it."""
    found, left = [], [schema]
    while left:
        value = _mapping(left.pop())
        if isinstance(value.get("$ref"), str):
            found.append(value["$ref"])
        for combined in ("anyOf", "oneOf", "allOf"):
            left.extend(value[combined] if isinstance(value.get(combined), list) else [])
    return found
