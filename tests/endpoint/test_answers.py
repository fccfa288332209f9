"""The live endpoint, over HTTP, in front of a real policy replica on a tiny model."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from sampo_ray.config.keys import render
from tests.endpoint.live import CONTEXT, HI, KEY, LONG, OTHER_KEY, Endpoint, get, key_entry, message
from tests.waiting import scaled, wait_until

pytestmark = pytest.mark.slow


def test_the_openai_client_chats(endpoint: Endpoint) -> None:
    answer = endpoint.client().chat.completions.with_raw_response.create(
        model="policy", messages=HI, max_tokens=8, temperature=0
    )
    assert answer.headers["x-policy-version"] == "0"
    assert answer.headers["x-policy-run"] == "run-a"
    completion = answer.parse()
    assert completion.model == "policy"
    assert completion.usage.completion_tokens == 8 or completion.choices[0].finish_reason == "stop"


def test_the_openai_client_streams_the_same_chat(endpoint: Endpoint) -> None:
    ask = {"model": "policy", "messages": HI, "max_tokens": 16, "temperature": 0}
    whole = endpoint.client().chat.completions.create(**ask)
    answer = endpoint.client().chat.completions.with_raw_response.create(**ask, stream=True)
    assert answer.headers["x-policy-version"] == "0"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer.parse() if chunk.choices)
    assert text == whole.choices[0].message.content


def test_the_openai_client_completes_and_streams_text(endpoint: Endpoint) -> None:
    ask = {"model": "policy", "prompt": "hello world", "max_tokens": 16, "temperature": 0}
    whole = endpoint.client().completions.create(**ask)
    chunks = endpoint.client().completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text


def test_completions_score_given_tokens(endpoint: Endpoint) -> None:
    ask = {"model": "policy", "prompt": [7, 8, 9], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    answer = endpoint.client().completions.create(**ask)
    assert len(answer.choices[0].logprobs.token_logprobs) == 4


def test_the_endpoint_renders_messages_to_the_ids_that_training_uses(endpoint: Endpoint) -> None:
    from sampo_ray.data.chat import ChatFormat

    turns = [{"role": "system", "content": "be brief"}, *HI, {"role": "assistant", "content": "hi"}, *HI]
    answer = endpoint.post("chat/completions", {"messages": turns, "max_tokens": 1, "return_token_ids": True})
    assert answer.json()["prompt_token_ids"] == ChatFormat.load(endpoint.model, "llama3-sampo").prompt_ids(turns)


def test_the_model_list_names_the_live_version(endpoint: Endpoint) -> None:
    card = endpoint.client().models.list().data[0]
    assert card.id == "policy"
    assert card.metadata["version"] == 0
    assert endpoint.client().models.retrieve("policy").id == "policy"
    with pytest.raises(openai.NotFoundError):
        endpoint.client().models.retrieve("policy:adapter")


@pytest.mark.parametrize("name", ["nobody", "policy:adapter", "policy@99", "Policy", "", "../policy"])
def test_an_unknown_model_is_a_404_that_lists_what_there_is(endpoint: Endpoint, name: str) -> None:
    for route, ask in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "x"})):
        answer = endpoint.post(route, {"model": name, **ask})
        assert answer.status_code == 404
        assert "serves policy" in message(answer)
        assert answer.headers["x-policy-version"] == "0"


CHAT = {"model": "policy", "messages": HI}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"[1]", 400, "object"),
        (b"null", 400, "object"),
        (b"\xff\xfe", 400, "Unicode"),
        (b"[" * 10_000, 400, "nested"),
        (b'{"temperature": NaN}', 400, "NaN"),
        (b'{"temperature": 1e999}', 400, "too large"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "Unicode"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "body"),
        ({}, 400, "messages"),
        ({**CHAT, "messages": []}, 400, "messages"),
        ({**CHAT, "messages": "hi"}, 400, "messages"),
        ({**CHAT, "messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({**CHAT, "messages": [*HI, {"role": 1, "content": "x"}]}, 400, "messages[1].role"),
        ({**CHAT, "messages": [{"role": "pirate", "content": "x"}]}, 400, "role"),
        (
            {
                **CHAT,
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}],
            },
            400,
            "messages[0].content",
        ),
        ({**CHAT, "temperature": "hot"}, 400, "temperature"),
        ({**CHAT, "temperature": -1}, 400, "temperature"),
        ({**CHAT, "top_p": 0}, 400, "top_p"),
        ({**CHAT, "n": 0}, 400, "n"),
        ({**CHAT, "max_tokens": "many"}, 400, "max_tokens"),
        ({**CHAT, "max_tokens": -1}, 400, "max_tokens"),
        ({**CHAT, "max_tokens": 100_000}, 400, "max_tokens"),
        ({**CHAT, "structured_outputs": 5}, 400, "structured_outputs"),
        ({**CHAT, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 3000}]}, 400, str(CONTEXT)),
        ({**CHAT, "chat_template": "{{ messages }}"}, 400, "chat_template"),
        ({**CHAT, "chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs"),
        ({**CHAT, "logprobs": True, "logprob_token_ids": [5]}, 400, "logprob_token_ids"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 30_000}]}, 413, "20000"),
    ],
)
def test_a_wrong_body_is_a_4xx_that_names_the_field(endpoint: Endpoint, body: Any, status: int, field: str) -> None:
    for stream in (False, True) if isinstance(body, dict) and body else (False,):
        answer = endpoint.post("chat/completions", {**body, "stream": stream} if stream else body)
        assert answer.status_code == status, answer.text
        assert field in message(answer)


def test_a_chunked_body_is_counted_too(endpoint: Endpoint) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b"x" * 1000 for _ in range(100))

    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{endpoint.url}/v1/completions", content=chunks(), headers=headers, timeout=scaled(30))
    assert answer.status_code == 413


def test_only_our_own_routes_exist(endpoint: Endpoint) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    for path in ("/docs", "/redoc", "/openapi.json", "/v1/embeddings", "/tokenize", "/metrics", "/page/"):
        answer = get(endpoint.url + path, headers=headers)
        assert answer.status_code == 404
        assert path in message(answer)
    assert get(endpoint.url + "/v1/completions", headers=headers).status_code == 405


def test_without_a_key_nothing_but_health_answers(endpoint: Endpoint) -> None:
    assert get(f"{endpoint.url}/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/docs", "/nothing", "/health/../v1/models"):
        answer = get(endpoint.url + path)
        assert answer.status_code == 401
        assert "Bearer" in message(answer)
        assert "x-policy-version" not in answer.headers
    assert endpoint.post("completions", {"prompt": "x"}, headers={"authorization": "Bearer wrong"}).status_code == 401
    second = {"authorization": f"Bearer {OTHER_KEY}"}
    assert endpoint.post("completions", {"prompt": "x", "max_tokens": 1}, headers=second).status_code == 200


def test_other_sites_scripts_get_no_permission(endpoint: Endpoint) -> None:
    origin = {"origin": "http://elsewhere.example", "access-control-request-method": "POST"}
    preflight = httpx.options(f"{endpoint.url}/v1/chat/completions", headers=origin, timeout=scaled(60))
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def limited(endpoint: Endpoint, route: str, body: Any, key: str = "use-key") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{endpoint.limited}/v1/{route}", json=body, headers=headers, timeout=scaled(60))


def test_keys_of_a_file_have_scopes_and_may_change_while_it_runs(endpoint: Endpoint) -> None:
    def status(path: str, key: str) -> int:
        return get(f"{endpoint.limited}{path}", headers={"authorization": f"Bearer {key}"}).status_code

    assert [status("/v1/models", key) for key in ("use-key", "admin-key", KEY)] == [200, 200, 401]
    assert [status("/admin/nothing", key) for key in ("use-key", "admin-key", KEY)] == [403, 404, 401]
    before = endpoint.keys_file.read_bytes()
    try:
        endpoint.keys_file.write_bytes(render([key_entry("admin")], False))
        wait_until(lambda: status("/v1/models", "use-key") == 401, "notice of the keys file")
        assert status("/v1/models", "admin-key") == 200
        endpoint.keys_file.write_bytes(b"- {")
        time.sleep(1.0)
        assert [status("/v1/models", key) for key in ("use-key", "admin-key")] == [401, 200]
    finally:
        endpoint.keys_file.write_bytes(before)
    wait_until(lambda: status("/v1/models", "use-key") == 200, "notice of the keys file")


def test_prompts_and_answers_have_limits(endpoint: Endpoint) -> None:
    long = " ".join(["x y z"] * 60)
    for route, ask, longer in [
        ("chat/completions", {"messages": HI}, {"messages": [{"role": "user", "content": long}]}),
        ("completions", {"prompt": "hello"}, {"prompt": long}),
        ("completions", {"prompt": [7] * 100}, {"prompt": [7] * 101}),
    ]:
        for stream in (False, True):
            refused = limited(endpoint, route, {**longer, "max_tokens": 1, "stream": stream})
            assert refused.status_code == 400, refused.text
            assert "more than the 100 tokens" in message(refused)
            assert limited(endpoint, route, {**ask, "max_tokens": 1, "stream": stream}).status_code == 200
        too_long = limited(endpoint, route, {**ask, "max_tokens": 21, "n": 2})
        assert too_long.status_code == 400 and "max_tokens" in message(too_long)
    ask = {"messages": HI, "ignore_eos": True, "temperature": 0}
    assert limited(endpoint, "chat/completions", ask).json()["usage"]["completion_tokens"] == 40
    assert (
        limited(endpoint, "chat/completions", {**ask, "n": 4, "temperature": 1}).json()["usage"]["completion_tokens"]
        == 40
    )


def test_counting_tokens_changes_no_stream(endpoint: Endpoint) -> None:
    ask = {"prompt": "hello world", "max_tokens": 16, "temperature": 0, "stream": True}

    def events(answer: httpx.Response) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [{k: v for k, v in json.loads(line).items() if k not in ("id", "created")} for line in lines]

    for options in ({}, {"stream_options": {"include_usage": True}}):
        plain, counted = (
            endpoint.post("completions", {**ask, **options}),
            limited(endpoint, "completions", ask | options),
        )
        texts = ["".join(c["text"] for e in events(a) for c in e["choices"]) for a in (plain, counted)]
        assert texts[0] == texts[1]
        assert [e.get("usage") for e in events(plain)][-1] == [e.get("usage") for e in events(counted)][-1]


BUSY = [
    ("completions", {"prompt": "x", "n": 10_000}),
    ("completions", {"prompt": [[7]] * 1000}),
    ("completions", {"prompt": "x", "best_of": 10_000}),
    ("completions", {"prompt": "x", "use_beam_search": True, "n": 200}),
    ("completions", {"prompt": "x", "stop": ["ab"] * 1000}),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}),
    ("completions", {"prompt": "x", "prompt_logprobs": -1}),
    ("completions", {"prompt": "x", "logprobs": 10_000}),
    ("completions", {"prompt": "x", "structured_outputs": {"regex": "(.{0,1000}){0,1000}"}}),
    ("completions", {"prompt": "x", "structured_outputs": {"json": {"type": "integer", "multipleOf": 7}}}),
    ("completions", {"prompt": "x", "structured_outputs": {"json": {"$ref": "#/nowhere"}}}),
    ("completions", {"prompt": "x", "structured_outputs": {"json": {"$ref": "http://elsewhere.example"}}}),
    ("completions", {"prompt": "x", "response_format": {"type": "json_schema"}}),
    ("chat/completions", {"messages": HI, "max_tokens": 2**63}),
    ("chat/completions", {"messages": HI, "logit_bias": {"x": 1}}),
    ("chat/completions", {"messages": HI, "logit_bias": {"-1": 1}}),
    ("chat/completions", {"messages": HI, "bad_words": [" "]}),
]


@pytest.mark.parametrize(("route", "ask"), BUSY)
def test_requests_that_ask_for_too_much_are_refused_at_once(
    endpoint: Endpoint, route: str, ask: dict[str, Any]
) -> None:
    started = time.monotonic()
    answer = endpoint.post(route, {"max_tokens": 2, **ask})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        message(answer)
    assert time.monotonic() - started < scaled(5)


def test_patterns_and_schemas_that_refer_to_themselves_are_answered(endpoint: Endpoint) -> None:
    year = {"type": "string", "pattern": "^[0-9]{4}$"}
    again = {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
    tree = {"type": "object", "properties": {"year": year, "again": again}, "required": ["year"]}
    for schema in (year, tree):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        ask = {"messages": HI, "max_tokens": 60, "response_format": form}
        answer = endpoint.post("chat/completions", ask)
        assert answer.status_code == 200, answer.text
        if schema is year:
            assert re.fullmatch("[0-9]{4}", json.loads(answer.json()["choices"][0]["message"]["content"]))
    for stream in (False, True):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
        answer = endpoint.post("chat/completions", {"messages": HI, "response_format": form, "stream": stream})
        assert answer.status_code == 400
        assert "no answer satisfies them" in message(answer)


def test_json_by_a_schema_is_answered(endpoint: Endpoint) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = endpoint.post("chat/completions", {"messages": HI, "max_tokens": 60, "response_format": form})
    assert json.loads(answer.json()["choices"][0]["message"]["content"])["a"] in (1, 2)


def test_a_swap_on_the_way_is_named_in_the_chunk_that_ends_the_answer(endpoint: Endpoint) -> None:
    ask = {"model": "policy", "prompt": "hello", "max_tokens": 480, "stream": True, "extra_body": {"ignore_eos": True}}
    for _ in range(10):  # on a busy machine an answer may end before the replica has the new weights
        before = endpoint.live()
        answer = endpoint.client().completions.with_raw_response.create(**ask)
        chunks = iter(answer.parse())
        first = next(chunks)
        endpoint.publish(before + 1)
        rest = list(chunks)
        assert answer.headers["x-policy-version"] == str(before)
        assert all(len(chunk.choices) == 1 for chunk in (first, *rest)), "clients read the first choice of every chunk"
        assert rest[-1].choices[0].finish_reason == "length"
        after = endpoint.post("completions", {"prompt": "hello", "max_tokens": 1})
        assert after.headers["x-policy-version"] == str(before + 1)
        assert "policy_versions" not in after.json()
        assert endpoint.client().models.list().data[0].metadata["version"] == before + 1
        if spans := getattr(rest[-1], "policy_versions", None):
            assert [span["version"] for span in spans] == [before, before + 1]
            return
    raise AssertionError("no answer was met by a swap")


def test_votes_are_stored_with_their_answers_and_outlive_a_kill(endpoint: Endpoint) -> None:
    from sampo_ray.run.feedback import read_votes
    from sampo_ray.run.storage import Place

    ask = {"model": "policy", "messages": HI, "max_tokens": 12, "temperature": 1.0}
    whole = endpoint.client().chat.completions.create(**ask)
    chunks = list(endpoint.client().chat.completions.create(**ask, stream=True))
    assert endpoint.judge(better=whole.id, worse=chunks[0].id, note="brief") == (200, False)
    assert endpoint.judge(better=whole.id, worse=chunks[0].id) == (200, True)
    assert endpoint.judge(response=chunks[0].id, edited="Hello.") == (200, False)
    other = endpoint.client().chat.completions.create(
        **{**ask, "messages": [*HI, {"role": "assistant", "content": "a"}, *HI]}
    )
    status, reason = endpoint.judge(tie=[whole.id, other.id])
    assert status == 400 and "different prompts" in reason
    assert endpoint.judge(response=whole.id, thumb="maybe")[0] == 400
    assert endpoint.judge(response="chatcmpl-0", thumb="up")[0] == 404
    several = endpoint.client().chat.completions.create(**ask, n=2)
    status, reason = endpoint.judge(response=several.id, thumb="up")
    assert status == 404 and several.id in reason
    refused = httpx.post(f"{endpoint.hasty}/feedback", json={"response": whole.id, "thumb": "up"}, timeout=scaled(60))
    assert refused.status_code == 403 and "serve.feedback.keep_hours" in message(refused)

    # Answers of the last second may go with the process.
    kept = Place(str(Path(endpoint.versions).parent)).at("feedback", "answers")
    wait_until(lambda: any(other.id in kept.at(name).read().decode() for name in kept.names()), "answer on disk")
    processes = [p for p in psutil.Process().children(recursive=True) if "ServeReplica:test-endpoint:" in p.name()]
    processes = processes or [
        p for p in psutil.process_iter() if "ServeReplica:test-endpoint:" in " ".join(p.cmdline())
    ]
    processes[0].kill()

    def answers() -> bool:
        with suppress(httpx.HTTPError, ValueError, KeyError):
            return endpoint.judge(better=whole.id, worse=chunks[0].id) == (200, True)
        return False

    wait_until(answers, "answer of the endpoint that takes its place")
    assert endpoint.judge(response=whole.id, thumb="up") == (200, False)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    votes = read_votes(Place(str(Path(endpoint.versions).parent)))
    comparison, edit, thumb = votes
    assert [answer.text for answer in comparison.answers] == [whole.choices[0].message.content, text]
    assert (comparison.kind, edit.kind, thumb.kind, comparison.note) == ("better", "edited", "up", "brief")
    assert edit.edited == "Hello." and edit.answers[0].id == chunks[0].id
    assert {answer.run for vote in votes for answer in vote.answers} == {"run-a"}
    assert all(answer.messages == HI and len(answer.versions) == 1 for answer in comparison.answers)


def test_a_request_that_takes_too_long_ends_with_a_504_or_an_error_in_its_stream(endpoint: Endpoint) -> None:
    answer = httpx.post(f"{endpoint.hasty}/v1/chat/completions", json=LONG, timeout=scaled(30))
    assert answer.status_code == 504
    assert "longer" in message(answer)
    ask = {"json": {**LONG, "stream": True}, "timeout": scaled(60)}
    with httpx.stream("POST", f"{endpoint.hasty}/v1/chat/completions", **ask) as stream:
        last = [line for line in stream.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(endpoint: Endpoint, stream: bool) -> None:
    for _ in range(4):  # all that the replica works on at once
        leave(endpoint, {**LONG, "stream": stream})
    started = time.monotonic()
    assert endpoint.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - started < scaled(5)


def leave(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Asks, and goes away at the first chunk or after a second."""
    auth, patience = {"authorization": f"Bearer {KEY}"}, httpx.Timeout(scaled(60), read=scaled(1))
    ask = httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=body, headers=auth, timeout=patience)
    with suppress(httpx.ReadTimeout), ask as answer:
        next(answer.iter_lines())
