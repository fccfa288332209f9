"""What a JSON schema asks for and the engine's grammar would overlook without a word.

By such a schema an answer that breaks it looks as if it had been held to it, so that the request is refused instead.
What is overlooked was tried with xgrammar 0.2.8, with which vLLM 0.29 compiles schemas (tests/test_schemas.py).
Values of `enum` and `const` are taken as they are, and alternatives of `oneOf` as those of `anyOf`.
"""

from collections.abc import Iterator, Mapping

from pydantic import JsonValue

NEVER = {
    *("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
    *("contains", "minContains", "maxContains", "uniqueItems", "patternProperties", "propertyNames", "multipleOf"),
}
"""Keywords that the grammar knows nothing of, or that vLLM refuses in the places where the grammar knows them."""
ELSEWHERE = ("$ref", "allOf", "anyOf", "oneOf")
"""Keywords for what other schemas say; only the first of them counts, and nothing that stands beside it."""
BY_TYPE = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "string": ("minLength", "maxLength", "pattern"),
    "array": ("minItems", "maxItems", "items", "prefixItems", "unevaluatedItems"),
    "object": ("minProperties", "maxProperties", "properties", "additionalProperties", "unevaluatedProperties"),
}
"""Keywords of a type. They count if the type is named, or can be told from one of TELLING."""
TELLING = {"items", "prefixItems", "unevaluatedItems", "properties", "additionalProperties", "unevaluatedProperties"}
CONSTRAINTS = {"required", *(name for names in BY_TYPE.values() for name in names)}


def overlooked(schema: JsonValue) -> str | None:
    """What the grammar would overlook, as a reason for a refusal; None if it holds an answer to the whole schema."""
    return next((reason for each in _schemas(schema) for reason in _reasons(each)), None)


def _reasons(schema: Mapping[str, JsonValue]) -> Iterator[str]:
    for name in sorted(NEVER & schema.keys()):
        if schema[name] not in (False, None):
            yield f"answers cannot be held to {name!r}; leave it out, and check the answer for it"
    elsewhere = [name for name in ELSEWHERE if name in schema]
    for name in (*elsewhere[1:], *(sorted(CONSTRAINTS & schema.keys()) if elsewhere else ())):
        yield f"{name!r} would be overlooked beside {elsewhere[0]!r}; write it into the schemas of {elsewhere[0]!r}"
    if isinstance(several := schema.get("allOf"), list) and len(several) != 1:
        yield "'allOf' of several schemas would allow anything; write them as one"
    if isinstance(place := schema.get("$ref"), str) and place != "#" and not place.startswith("#/"):
        yield "$ref must name a place in the schema itself, such as #/$defs/name"
    if "type" not in schema and not elsewhere:
        told = TELLING & schema.keys()
        for kind, names in BY_TYPE.items():
            for name in (each for each in names if each in schema and not told & set(names)):
                yield f'{name!r} would be overlooked without a type; add "type": "{kind}"'
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(required, list):
        known = properties if isinstance(properties, dict) else {}
        for name in (each for each in required if isinstance(each, str) and each not in known):
            yield f"the required {name[:80]!r} is not in 'properties', without which nothing asks for it; add it"


def _schemas(schema: JsonValue) -> Iterator[dict[str, JsonValue]]:
    """The schema and all within it, but no values that look like some (`enum`, `const`, `default`, `examples`)."""
    pending = [schema]
    while pending:
        if not isinstance(each := pending.pop(), dict):
            continue
        yield each
        for name, inner in each.items():
            if name in ("properties", "$defs", "definitions") and isinstance(inner, dict):
                pending.extend(inner.values())
            elif name in ("allOf", "anyOf", "oneOf", "prefixItems") and isinstance(inner, list):
                pending.extend(inner)
            elif name in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"):
                pending.append(inner)
