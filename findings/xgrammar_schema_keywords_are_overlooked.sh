#!/usr/bin/env bash
# xgrammar: parts of a JSON schema constrain nothing; two schemas under `allOf`, or a `$ref` elsewhere, allow any JSON
#
# Packages   xgrammar 0.2.8, torch 2.13.0, jsonschema 4.26.0 for the standard's verdict. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      Valid schemas (draft 2020-12), each with a text that breaks it.
# Expected   The compiled grammar does not accept the text, or compiling the schema fails.
# Happens    The grammar accepts it. `from_json_schema` raises nothing; of some cases there is a line on standard error.
#            Two schemas under `allOf`, and a `$ref` to another document, become a grammar of any JSON. Beside `$ref`,
#            `anyOf` and `oneOf` all other keywords are dropped. `required` asks only for names that are in `properties`.
#            `not`, `if`, `dependentRequired`, `uniqueItems` and `contains` are dropped, and bounds without a `type`.
# Seen       allOf of two         "any"      keeps to the schema: no   accepted: yes
#            $ref elsewhere       "any"      keeps to the schema: no   accepted: yes
#            beside $ref          3          keeps to the schema: no   accepted: yes
#            beside anyOf         {"b": 1}   keeps to the schema: no   accepted: yes
#            required only        {}         keeps to the schema: no   accepted: yes
#            not                  3          keeps to the schema: no   accepted: yes
#            if, then             {"a": 1}   keeps to the schema: no   accepted: yes
#            dependentRequired    {"a": 1}   keeps to the schema: no   accepted: yes
#            uniqueItems          [1, 1]     keeps to the schema: no   accepted: yes
#            contains             [1, 1]     keeps to the schema: no   accepted: yes
#            bound without type   1          keeps to the schema: no   accepted: yes
# Matters    Structured outputs of vLLM are compiled by xgrammar. vLLM 0.29 refuses some of these keywords beforehand
#            (uniqueItems and contains, where `type` is "array"), but not the others: answers then look as if they had
#            been held to the schema. A service in front must refuse such schemas, or check the answers.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 xgrammar==0.2.8 jsonschema==4.26.0
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import sys

import jsonschema
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string

INTEGER = {"type": "integer"}
A, B = ({"type": "object", "properties": {name: INTEGER}, "required": [name]} for name in "ab")
CASES = {
    "allOf of two": ({"allOf": [A, B]}, '"any"'),
    "$ref elsewhere": ({"$ref": "urn:example:integer"}, '"any"'),
    "beside $ref": ({"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 5}, "3"),
    "beside anyOf": ({**A, "anyOf": [B]}, '{"b": 1}'),
    "required only": ({"type": "object", "required": ["a"]}, "{}"),
    "not": ({"type": "integer", "not": {"const": 3}}, "3"),
    "if, then": ({**A, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}'),
    "dependentRequired": ({**A, "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    "uniqueItems": ({"type": "array", "items": INTEGER, "uniqueItems": True}, "[1, 1]"),
    "contains": ({"type": "array", "items": INTEGER, "contains": {"const": 3}}, "[1, 1]"),
    "bound without type": ({"minimum": 3}, "1"),
}
registry = Registry().with_resource("urn:example:integer", DRAFT202012.create_resource(INTEGER))
seen = []
for name, (schema, text) in CASES.items():
    jsonschema.Draft202012Validator.check_schema(schema)
    keeps = jsonschema.Draft202012Validator(schema, registry=registry).is_valid(json.loads(text))
    accepted = _is_grammar_accept_string(Grammar.from_json_schema(json.dumps(schema)), text)
    print(f"{name:<20} {text:<10} keeps to the schema: {'yes' if keeps else 'no':<4} accepted: {'yes' if accepted else 'no'}")
    seen.append(accepted and not keeps)
sys.exit(0 if all(seen) else 1)
PYTHON
