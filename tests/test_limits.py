"""Limits of keys and bodies: the token bucket, the middleware in front of a small app, and the checks of bodies."""

import asyncio
import json
import pickle
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.responses import JSONResponse, Response, StreamingResponse

from sampo_ray.config.serving import ServeConfig
from sampo_ray.serve import errors
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.middleware import limits
from sampo_ray.serve.middleware.auth import Access, Authentication
from sampo_ray.serve.middleware.limits import Bucket, LimitRequests, Limits, TokenCounter
from sampo_ray.serve.requests.json_body import check_constraints, read_json
from sampo_ray.serve.requests.openai import ChatCompletionRequest, CompletionRequest, read_request


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(st.tuples(st.floats(0, 90), st.floats(0.5, 50)), max_size=40)


@given(st.integers(1, 1000), STEPS)
def test_a_bucket_gives_no_more_than_a_full_bucket_and_its_refill(
    per_minute: int, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket, taken = Bucket(per_minute, clock), [(clock.now, 0.0)]
    for pause, _ in steps:
        clock.now += pause
        if bucket.wait() == 0:
            bucket.take()
            taken.append((clock.now, 1.0))
    for start, _ in taken:
        for end, _ in taken:
            inside = sum(amount for at, amount in taken if start <= at <= end)
            if end >= start:
                assert inside <= per_minute * (1 + (end - start) / 60) + 1e-3


@given(st.integers(1, 1000), STEPS)
def test_the_wait_ends_exactly_when_the_bucket_has_enough(per_minute: int, steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for pause, amount in steps:
        clock.now += pause
        bucket.take(amount)  # also more than the bucket holds
        wait = bucket.wait()
        if wait > 0.01:
            clock.now += wait - 0.01
            assert bucket.wait() > 0
            clock.now += 0.02
        assert bucket.wait() == 0 or wait == 0


@given(st.integers(1, 100), st.floats(0, 1e9))
def test_an_idle_bucket_fills_up_to_one_minute(per_minute: int, rest: float) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    clock.now += rest
    for _ in range(per_minute):
        assert bucket.wait() == 0
        bucket.take()
    assert bucket.wait() > 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    clock.now -= 100
    assert bucket.wait() == pytest.approx(1.0)
    clock.now += 101
    assert bucket.wait() == 0


USAGE = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n"


def small_app(clock: Clock | None = None, keys: tuple[str, ...] = ("a", "b"), **config: Any) -> FastAPI:
    """An app whose answers have a usage, streamed or not."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    settings = ServeConfig(**{"api_keys": tuple(map(SecretStr, keys)), **config})
    app.add_middleware(LimitRequests, limits=Limits.of(settings), clock=clock or Clock())
    app.add_middleware(Authentication, access=Access.of(settings, "127.0.0.1"))

    async def words(hint: bool) -> AsyncIterator[str]:
        for text in ("one", 'two "usage":{"total_tokens":999', "three\n\n"):
            yield event(choices=[{"text": text}])
        yield (event(choices=[], usage=USAGE) if hint else "") + "data: [DONE]\n\n"

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_request(request, CompletionRequest, 2000)
        if body.stream:
            asked = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(words(asked), media_type="text/event-stream")
        text = json.dumps(
            {"choices": [{"text": '"usage":{"total_tokens":999}'}], "usage": USAGE}, separators=(",", ":")
        )
        return Response(text, media_type="application/json")

    @app.post("/feedback")
    async def feedback(request: Request) -> Response:
        return JSONResponse(await read_json(request, 2000))

    @app.post("/admin/promote")
    @app.get("/v1/models")
    async def other() -> Response:
        return JSONResponse({})

    return app


def ask(app: Any, body: Any, key: str = "a", path: str = "/v1/completions", method: str = "POST") -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            content = body if not isinstance(body, dict) else json.dumps(body)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(call())


def test_a_key_with_too_many_requests_is_told_when_to_try_again() -> None:
    clock = Clock()
    app = small_app(clock, requests_per_minute=6)
    answers = [ask(app, {"prompt": "x"}).status_code for _ in range(7)]
    assert answers == [200] * 6 + [429]
    refused = ask(app, {"prompt": "x"})
    assert refused.headers["retry-after"] == "10"
    assert "requests per minute" in refused.json()["error"]["message"]
    assert ask(app, {"prompt": "x"}, key="b").status_code == 200
    clock.now += 9.9
    assert ask(app, {"prompt": "x"}).status_code == 429
    clock.now += 0.2
    assert ask(app, {"prompt": "x"}).status_code == 200


def test_an_endpoint_with_too_many_requests_in_flight_says_when_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_IN_FLIGHT", 2)
    app, release = FastAPI(), asyncio.Event()
    errors.install(app)
    app.add_middleware(LimitRequests, limits=Limits())

    @app.post("/admin/rollback")
    async def rollback() -> None:
        pass

    inside: list[None] = []

    @app.get("/")
    async def wait() -> None:
        inside.append(None)
        await release.wait()

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            first = [asyncio.create_task(client.get("/")) for _ in range(2)]
            while len(inside) < 2:
                await asyncio.sleep(0)
            refused = await client.get("/")
            assert (await client.post("/admin/rollback")).status_code == 200
            release.set()
            return [refused, *await asyncio.gather(*first), await client.get("/")]

    answers = asyncio.run(crowd())
    assert [answer.status_code for answer in answers] == [429, 200, 200, 200]
    assert int(answers[0].headers["retry-after"]) > 0


def test_get_and_admin_requests_are_not_counted() -> None:
    app = small_app(requests_per_minute=1)
    for path, method in (("/v1/models", "GET"), ("/admin/promote", "POST")):
        assert [ask(app, b"", path=path, method=method).status_code for _ in range(5)] == [200] * 5
    assert [ask(app, {}, path="/feedback").status_code for _ in range(2)] == [200, 429]


def test_requests_without_a_key_share_one_quota() -> None:
    app = small_app(keys=(), requests_per_minute=2)
    assert [ask(app, {"prompt": "x"}, key=key).status_code for key in ("", "x", "y")] == [200, 200, 429]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_charged_by_the_answers_usage(stream: bool) -> None:
    clock = Clock()
    app = small_app(clock, tokens_per_minute=25)
    answers = [ask(app, {"prompt": "x", "stream": stream}).status_code for _ in range(4)]
    assert answers == [200, 200, 200, 429]  # 25 - 3 * 10: in debt
    refused = ask(app, {"prompt": "x"})
    assert refused.headers["retry-after"] == "15"  # 6 tokens at 25 a minute
    clock.now += 15
    assert ask(app, {"prompt": "x"}).status_code == 200


def test_a_stream_shows_its_usage_to_clients_that_asked_for_it() -> None:
    app = small_app(tokens_per_minute=1000)
    for options, shown in [(None, False), ({"include_usage": False}, False), ({"include_usage": True}, True)]:
        answer = ask(app, {"prompt": "x", "stream": True, **({"stream_options": options} if options else {})})
        chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]] == [
            "one",
            'two "usage":{"total_tokens":999',
            "three\n\n",
        ]
        assert any("usage" in chunk for chunk in chunks) == shown
        assert answer.text.endswith("data: [DONE]\n\n")


def counted(*bodies: str, status: int = 200, received: int = 0, ended: bool = True) -> TokenCounter:
    counting = TokenCounter()
    counting.request_bytes = received
    counting.count({"type": "http.response.start", "status": status, "headers": []})
    for position, body in enumerate(bodies):
        more = not ended or position < len(bodies) - 1
        counting.count({"type": "http.response.body", "body": body.encode(), "more_body": more})
    return counting


def test_an_answer_that_was_cut_off_is_charged_by_the_events_that_were_sent() -> None:
    assert counted(event(choices=[1]), event(choices=[1]) * 3, received=40, ended=False).tokens == 4 + 10
    assert counted(received=40, ended=False).tokens == 10
    assert counted(event(choices=[1]), event(error={}), received=40).tokens == 2 + 10
    assert counted('{"error": {}}', status=400, received=40).tokens == 0
    assert counted("{}", received=40).tokens == 0


def test_an_answer_that_nobody_waits_for_is_charged_by_what_was_generated() -> None:
    for status, ended, charged in ((200, False, 256 * 30 + 10), (504, True, 256 * 30 + 10)):
        counter = counted(*(['{"error": {}}'] if ended else []), status=status, received=40, ended=ended)
        assert counter.tokens == (0 if ended else 10)
        counter.generated = 256 * 30
        assert counter.tokens == charged
    counter = counted(json.dumps({"choices": [1], "usage": USAGE}, separators=(",", ":")), received=40)
    counter.generated = 2
    assert counter.tokens == 10, "its usage, once it is known"


def test_the_usage_so_far_of_one_choice_is_not_that_of_the_answer() -> None:
    so_far = event(choices=[1], usage={"prompt_tokens": 7, "total_tokens": 8, "completion_tokens": 1})
    assert counted(so_far * 40, received=40, ended=False).tokens == 40 + 10
    assert counted(so_far * 40, event(choices=[], usage=USAGE), "data: [DONE]\n\n", received=40).tokens == 10


@given(st.lists(st.integers(0, 50)), st.integers(0, 40), st.integers(0, 500), st.booleans())
def test_hanging_up_later_never_costs_less_and_never_less_than_was_generated(
    progress: list[int], events: int, received: int, whole: bool
) -> None:
    counter, charged = counted(received=received, ended=False), [0]
    for tokens in progress if whole else [1] * events:
        if whole:
            counter.generated += tokens
        else:
            counter.count({"type": "http.response.body", "body": event(choices=[1]).encode(), "more_body": True})
        charged.append(counter.tokens)
    assert charged == sorted(charged)
    assert counter.tokens == (sum(progress) if whole else events) + received // 4


def test_a_client_that_hangs_up_early_waits_for_what_it_had_computed() -> None:
    clock, seen = Clock(), list[float]()
    settings = Limits(tokens_per_minute=600)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scope["state"]["token_counter"].generated = 256 * 10
        await asyncio.sleep(60)  # Serve cancels the request when its client is gone

    async def hang_up() -> None:
        app = LimitRequests(answer, settings, clock)
        scope: Any = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "state": {}}

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * 160}

        async def send(message: Any) -> None:
            seen.append(message["status"])

        asking = asyncio.create_task(app(dict(scope), receive, send))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
        with suppress(KeyError):
            await app(dict(scope), receive, send)

    asyncio.run(hang_up())
    assert seen == [429]


@given(st.text(), st.integers(0, 10**9))
def test_no_text_of_an_answer_is_taken_for_its_usage(text: str, total: int) -> None:
    body = {"choices": [{"text": text + '"usage":{"total_tokens":5}', "logprobs": {text: -1.0, "usage": -2.0}}]}
    dumped = json.dumps({**body, "usage": {"prompt_tokens": 0, "total_tokens": total}}, separators=(",", ":"))
    assert counted(dumped).tokens == total


@pytest.mark.parametrize("path", ["/v1/completions", "/feedback"])
def test_a_body_too_large_is_refused_on_every_route(path: str) -> None:
    assert ask(small_app(), b" " * 2001, path=path).status_code == 413


def test_a_body_that_grows_too_large_or_comes_too_slowly_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def large() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    async def slow() -> AsyncIterator[bytes]:
        yield b" "
        await asyncio.Event().wait()

    assert ask(small_app(), large()).status_code == 413
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.2)
    answer = ask(small_app(), slow())
    assert answer.status_code == 408
    assert "body" in answer.json()["error"]["message"]


def within(kind: Any, body: dict[str, Any], **limit: int) -> Any:
    """The request that `body` becomes within the limits."""
    right = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatCompletionRequest else {"prompt": "x"}

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({**right, **body}).encode()}

    state = {"limits": Limits(**limit), "token_counter": TokenCounter()}
    scope = {"type": "http", "method": "POST", "headers": [], "state": state}
    return asyncio.run(read_request(Request(scope, receive), kind, 1 << 20))


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (ChatCompletionRequest, {"max_tokens": 101}, "max_tokens"),
        (ChatCompletionRequest, {"max_completion_tokens": 101, "max_tokens": 1}, "max_completion_tokens"),
        (ChatCompletionRequest, {"max_tokens": 51, "n": 2}, "max_tokens"),
        (ChatCompletionRequest, {"n": 101}, "max_tokens"),
        (CompletionRequest, {"max_tokens": 26, "prompt": ["a", "b"], "n": 2}, "max_tokens"),
        (CompletionRequest, {"max_tokens": 51, "prompt": [[1], [2]]}, "max_tokens"),
        (CompletionRequest, {"max_tokens": 2**63}, "max_tokens"),
        (ChatCompletionRequest, {"n": 10_000}, "n"),
        (CompletionRequest, {"prompt": [[1]] * 10_000}, "prompt"),
        (CompletionRequest, {"prompt": ["a"] * 257}, "prompt"),
        (CompletionRequest, {"stop_token_ids": [1] * 65}, "stop_token_ids"),
        (CompletionRequest, {"stop": ["a"] * 100_000}, "stop"),
        (CompletionRequest, {"prompt": [*[1] * 200_000, "x"]}, "prompt"),
        (CompletionRequest, {"prompt": [[1], "x"]}, "prompt"),
        (CompletionRequest, {"prompt": [10**30]}, "prompt"),
        (CompletionRequest, {"prompt": [-1]}, "prompt"),
        (CompletionRequest, {"allowed_token_ids": [*[1] * 100_000, "x"]}, "allowed_token_ids"),
        (CompletionRequest, {**{f"f{i}": i for i in range(50_000)}, "structured_outputs": 5}, "structured_outputs"),
        (CompletionRequest, {"bad_words": ["a"] * 65}, "bad_words"),
        (CompletionRequest, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        (CompletionRequest, {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        (CompletionRequest, {"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
        (CompletionRequest, {"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (CompletionRequest, {"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs.choice"),
        (CompletionRequest, {"structured_outputs": {"choice": ["a" * 20_001]}}, "structured_outputs.choice"),
        (CompletionRequest, {"structured_outputs": {"json": "[" * 50_000}}, "structured_outputs.json"),
        (CompletionRequest, {"structured_outputs": {"json": "["}}, "structured_outputs.json"),
        (CompletionRequest, {"response_format": {"type": "structural_tag", "format": {}}}, "response_format.type"),
    ],
)
def test_more_than_the_limits_allow_is_a_400_that_names_the_field(kind: Any, body: dict[str, Any], field: str) -> None:
    started = time.process_time()
    with pytest.raises(ApiError) as refused:
        within(kind, body, max_answer_tokens=100)
    assert refused.value.status == 400
    assert refused.value.param == field
    assert refused.value.message.startswith(field)
    assert time.process_time() - started < 2


SCHEMAS = {
    "elsewhere": {"$ref": "http://elsewhere.example"},
    "wide": {"properties": {f"p{i}": {"type": "string"} for i in range(300)}},
    "long": {"const": "x" * 30_000},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_are_too_large_or_point_elsewhere_are_refused_wherever_they_stand(name: str) -> None:
    deep: Any = {}
    for _ in range(40):
        deep = {"items": deep}
    for schema in (SCHEMAS[name], deep):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        for body in (
            {"structured_outputs": {"json": schema}},
            {"structured_outputs": {"json": json.dumps(schema)}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ):
            with pytest.raises(ApiError, match=r"json|schema|parameters"):
                within(ChatCompletionRequest, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["json", "type", "json_schema", "schema", "function", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["structured_outputs", "response_format", "tools"]), JSON, max_size=3))
def test_constraints_of_wrong_types_are_left_to_validation_or_refused(body: dict[str, Any]) -> None:
    with suppress(ApiError):
        check_constraints(body)


def test_ordinary_schemas_are_taken() -> None:
    schema = {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "maxLength": 5},
            "when": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[a-z]{2}$"},
            "tree": {"$ref": "#/$defs/tree"},
            "again": {"$ref": "#"},
        },
        "required": ["pattern"],
        "$defs": {"tree": {"properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}}},
    }
    for body in (
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ):
        within(ChatCompletionRequest, body)


def test_limits_travel_with_a_request_that_names_none_itself() -> None:
    sent = within(ChatCompletionRequest, {"n": 3}, max_answer_tokens=100, max_prompt_tokens=50)
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived.to_sampling_params(400, {}).max_tokens == 33
    assert arrived.to_sampling_params(20, {}).max_tokens == 20
    assert within(CompletionRequest, {}, max_answer_tokens=10).to_sampling_params(16, {}).max_tokens == 10
    assert within(CompletionRequest, {"max_tokens": 8}, max_answer_tokens=10).to_sampling_params(8, {}).max_tokens == 8


def test_a_prompt_is_measured_where_it_has_become_tokens() -> None:
    from vllm.exceptions import VLLMValidationError

    class Model:
        max_model_len = 512

    for kind in (ChatCompletionRequest, CompletionRequest):
        params = within(kind, {}, max_prompt_tokens=50).build_tok_params(Model())
        assert params.apply_post_tokenization(None, {"prompt_token_ids": [1] * 50})
        with pytest.raises(VLLMValidationError, match="50 tokens"):
            params.apply_post_tokenization(None, {"prompt_token_ids": [1] * 51})
