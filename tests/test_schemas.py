"""Schemas that the engine's grammar overlooks parts of are refused, and no others."""

import json
from typing import Annotated, Any, Literal

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from xgrammar.testing import _is_grammar_accept_string

from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.requests.json_body import check_constraints
from sampo_ray.serve.requests.schemas import overlooked

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OVERLOOKED = [
    ({"type": "integer", "not": {"const": 3}}, "3"),
    ({**A, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}'),
    ({**A, "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}}, "[1, 1]"),
    ({"allOf": [A, {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}]}, '"x"'),
    ({"allOf": [A], "properties": {"b": {"type": "integer"}}, "required": ["b"]}, '{"a": 1}'),
    ({"anyOf": [{"type": "integer"}], "minimum": 5}, "3"),
    ({"oneOf": [A], "required": ["b"]}, '{"a": 1}'),
    ({"anyOf": [{"type": "integer"}], "oneOf": [{"type": "string"}]}, "3"),
    ({"$ref": "#/$defs/n", "minimum": 5, "$defs": {"n": {"type": "integer"}}}, "3"),
    ({"$ref": "https://schemas.example/integer"}, '"x"'),
    ({"$ref": "#named", "$defs": {"n": {"$anchor": "named", "type": "integer"}}}, '"x"'),
    ({"type": "object", "required": ["a"]}, "{}"),
    ({"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["a"]}, '{"b": 1}'),
    ({"minimum": 3}, "1"),
    ({"maxLength": 1}, '"aaa"'),
    ({"pattern": "^a$"}, '"b"'),
    ({"minItems": 2}, "[1]"),
    ({"minProperties": 2}, '{"a": 1}'),
    ({"items": {"type": "integer"}, "minLength": 2}, "[1]"),
]
HELD = [
    (A, "{}"),
    ({"allOf": [A], "description": "one", "default": {"a": 1}}, "{}"),
    ({"anyOf": [A, {"type": "null"}], "type": ["object", "null"], "title": "x"}, "{}"),
    ({"$ref": "#/$defs/a", "$defs": {"a": A}, "description": "x"}, "{}"),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a"], "minProperties": 1}, "{}"),
    ({"items": {"type": "integer"}, "minItems": 2}, "[1]"),
    ({"type": ["integer", "string"], "minimum": 3}, "1"),
    ({"type": "string", "pattern": "^a$"}, '"b"'),
    ({"type": "object", "properties": {"not": A, "required": {"const": {"not": 1}}}, "required": ["not"]}, "{}"),
    ({"enum": [{"not": 1, "$ref": "http://x.example"}, 2]}, "3"),
]


def accepts(schema: Any, answer: str) -> bool:
    return _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(schema)), answer)


@pytest.mark.parametrize(("schema", "answer"), OVERLOOKED)
def test_what_xgrammar_0_2_8_does_not_hold_an_answer_to_is_refused(schema: Any, answer: str) -> None:
    assert accepts(schema, answer)
    for within in (schema, {"items": schema}, {"properties": {"x": schema}}, {"anyOf": [{"type": "null"}, schema]}):
        assert overlooked(within)


@pytest.mark.parametrize(("schema", "answer"), HELD)
def test_what_it_holds_an_answer_to_is_taken(schema: Any, answer: str) -> None:
    assert not accepts(schema, answer)
    assert overlooked(schema) is None


class Part(BaseModel):
    kind: Literal["a", "b"] = "a"
    size: int = Field(3, ge=1, le=9, description="how large")


class Order(BaseModel):
    """What pydantic and OpenAI's client make of a model."""

    name: Annotated[str, Field(min_length=1, max_length=20, pattern="^[a-z]+$")] | None = None
    parts: Annotated[list[Part], Field(min_length=1)] = Field(description="all parts")
    best: Part | None = Field(None, description="the best part")
    by_name: dict[str, Part] = {}
    place: tuple[int, str] = (1, "x")


def test_schemas_of_pydantic_are_taken() -> None:
    assert overlooked(Order.model_json_schema()) is None


def test_a_schema_is_refused_where_the_answer_has_to_keep_to_it() -> None:
    schema = {"type": "integer", "not": {"const": 3}}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": schema}}},
    }
    strictly = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    loosely = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
    named = {"type": "function", "function": {"name": "f"}}
    for body in (
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"response_format": strictly},
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool], "tool_choice": named},
    ):
        with pytest.raises(ApiError, match="answers cannot be held to 'not'; leave it out"):
            check_constraints(body)
    check_constraints({"response_format": loosely})
    check_constraints({"tools": [tool]})
    check_constraints({"tools": [tool], "tool_choice": "auto"})


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["properties", "required", "allOf", "$ref", "items", "type", "not", "$defs"]), inner
        )
    ),
    max_leaves=10,
)


@given(ANY)
def test_any_json_gets_an_answer(schema: Any) -> None:
    reason = overlooked(schema)
    assert reason is None or reason
