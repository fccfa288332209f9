"""Tool calls through the OpenAI client. The tiny model answers at random: what it must call is in the grammar."""

import json
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.endpoint.live import HI, Endpoint
from tests.waiting import scaled

pytestmark = pytest.mark.slow

PLANETS = ["Mars", "Venus"]
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a planet.",
        "parameters": {
            "type": "object",
            "properties": {"planet": {"enum": PLANETS}},
            "required": ["planet"],
            "additionalProperties": False,
        },
    },
}
ASK: dict[str, Any] = {"model": "policy", "messages": HI, "tools": [FIND], "max_tokens": 100}
NAMED = {"type": "function", "function": {"name": "find"}}


def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.open}/v1", api_key="none", max_retries=0, timeout=scaled(60))


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(endpoint: Endpoint, choice: Any) -> None:
    tokens = AutoTokenizer.from_pretrained(endpoint.model)
    bias = {
        str(token): -100 for token in range(len(tokens)) if not tokens.decode([token]).strip()
    }  # JSON may have many
    bias[str(tokens.get_vocab()["<|eot_id|>"])] = 100  # `required` allows any number of calls: one will do
    ask = {**ASK, "max_tokens": 200, "tool_choice": choice, "logit_bias": bias}
    answer = client(endpoint).chat.completions.create(**ask)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "find" and call.id
    assert json.loads(call.function.arguments)["planet"] in PLANETS
    name, arguments = "", ""
    for chunk in client(endpoint).chat.completions.create(**ask, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.index == 0:
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    assert name == "find" and json.loads(arguments)["planet"] in PLANETS


def test_the_policy_sees_tools_calls_and_results_and_may_answer_without_a_call(endpoint: Endpoint) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "find", "arguments": '{"planet": "Mars"}'}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "red and cold"},
    ]
    for tool_choice in ("auto", "none"):
        ask = {**ASK, "messages": turns, "max_tokens": 8, "tool_choice": tool_choice}
        answer = client(endpoint).chat.completions.create(**ask, extra_body={"return_token_ids": True})
        assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
        prompt = AutoTokenizer.from_pretrained(endpoint.model).decode(answer.prompt_token_ids)
        for seen in (
            "Finds a planet.",
            '<tool_call>\n{"name": "find", "arguments": {"planet": "Mars"}}',
            "red and cold",
        ):
            assert seen in prompt


def test_an_endpoint_without_tools_names_the_setting_that_turns_them_on(endpoint: Endpoint) -> None:
    for choice in ("auto", "required", NAMED):
        with pytest.raises(openai.BadRequestError, match=r"tools: .*its operator turns them on with serve\.tools"):
            endpoint.client().chat.completions.create(**ASK, tool_choice=choice)
    answer = endpoint.client().chat.completions.create(**ASK, tool_choice="none")
    plain = endpoint.client().chat.completions.create(**{k: v for k, v in ASK.items() if k != "tools"})
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_openais_other_routes_name_those_that_there_are(endpoint: Endpoint) -> None:
    for ask in (
        lambda: endpoint.client().responses.create(model="policy", input="hello"),
        lambda: endpoint.client().embeddings.create(model="policy", input="hello"),
    ):
        with pytest.raises(openai.NotFoundError, match="this endpoint has POST /v1/chat/completions"):
            ask()


def test_what_the_engine_would_need_an_option_for_is_refused_by_its_field(endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError, match="thinking_token_budget: this endpoint is not set up for it"):
        endpoint.client().chat.completions.create(model="policy", messages=HI, extra_body={"thinking_token_budget": 5})
