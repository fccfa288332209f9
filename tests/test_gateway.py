"""The endpoint's parts that need no engine: keys, bodies, errors, headers."""

import asyncio
import json
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from sampo_ray.actors.policy.messages import AnsweredBy, AnswerItem, Chunks, Failure, LivePosition, Progress, Whole
from sampo_ray.config.serving import ServeConfig
from sampo_ray.errors import EndpointError, PausedError
from sampo_ray.run.versions import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.catalogue import Target
from sampo_ray.serve.endpoint import check_port, free_port
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.gateway import Answer, PolicyApp, PolicyIngress, _stream
from sampo_ray.serve.middleware.auth import Access, Authentication
from sampo_ray.serve.middleware.headers import ResponseHeaders, version_headers
from sampo_ray.serve.middleware.limits import TokenCounter
from sampo_ray.serve.requests.json_body import decode
from sampo_ray.serve.requests.openai import ChatCompletionRequest, CompletionRequest, read_request, validated

KEYS = (SecretStr("one"), SecretStr("two words"))


def call(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=more.pop("root_path", ""))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def small_app(*keys: SecretStr) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(ResponseHeaders, defaults=lambda: version_headers(WeightsId("run-a", 7)))
    app.add_middleware(Authentication, access=Access.of(ServeConfig(api_keys=keys), "127.0.0.1"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret of the house")

    @app.post("/body")
    async def body(request: Request) -> dict[str, Any]:
        return (await read_request(request, CompletionRequest, 100)).model_dump(include={"prompt"})

    return app


def test_errors_carry_the_live_version_but_not_to_strangers() -> None:
    known = call(small_app(*KEYS), "GET", "/nothing", headers={"authorization": "Bearer one"})
    assert (known.headers["x-policy-version"], known.headers["x-policy-run"]) == ("7", "run-a")
    assert "x-policy-version" not in call(small_app(*KEYS), "GET", "/nothing").headers


def test_an_unexpected_failure_says_nothing_about_itself() -> None:
    answer = call(small_app(), "GET", "/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("length", ["101", "-1", "x", "1" * 30])
def test_a_body_announced_as_too_large_is_not_read(length: str) -> None:
    answer = call(small_app(), "POST", "/body", content=b"{}", headers={"content-length": length})
    assert answer.status_code == 413
    assert "100" in answer.json()["error"]["message"]


def test_a_body_that_grows_too_large_is_cut_off() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 10

    assert call(small_app(), "POST", "/body", content=chunks()).status_code == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_any_json_object_of_text_and_finite_numbers_decodes_to_itself(body: dict[str, Any]) -> None:
    assert decode(json.dumps(body).encode()) == body


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_other_bytes_are_an_object_or_a_400(raw: bytes) -> None:
    with suppress(ApiError):
        assert isinstance(decode(raw), dict)


def test_a_validation_error_names_the_field_and_keeps_the_value_to_itself() -> None:
    answer = call(small_app(), "POST", "/body", json={"prompt": "x", "logit_bias": {"5": "private words"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("logit_bias")
    assert "private" not in answer.text


def test_engine_errors_become_answers_that_say_whether_to_try_again() -> None:
    assert errors.from_engine(400, "too long", "prompt").status == 400
    assert errors.from_engine(501, "no such feature").status == 400
    dead = errors.from_engine(500, "EngineCore encountered an issue. See stack trace")
    assert (dead.status, "EngineCore" in dead.message) == (503, False)
    assert errors.from_policy(RayActorError()).status == 503
    asleep = errors.from_policy(RayTaskError("answer", "Traceback ...", PausedError("paused")).as_instanceof_cause())
    assert (asleep.status, asleep.code) == (503, "policy_paused")
    assert asleep.headers == {"retry-after": str(errors.PAUSED_RETRY_S)} and errors.PAUSED_RETRY_S >= 10
    full = errors.from_policy(BackPressureError(5, 5))
    assert (full.status, full.headers) == (429, {"retry-after": str(errors.RETRY_AFTER_S)})


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("thinking_token_budget is set. Please set --reasoning-parser and/or --reasoning-config to use it.", True),
        ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', False),
        ("The `logits_processors` argument is not supported. See --logits-processor-pattern engine argument", True),
        ("too long; set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", False),
    ],
)
def test_the_engines_advice_to_its_operator_does_not_reach_a_client(message: str, field: bool) -> None:
    error = errors.from_engine(400, message)
    assert (error.status, "--" in error.message, "VLLM" in error.message) == (400, False, False)
    assert (error.param is not None) == field and error.message.startswith(error.param or "body")
    assert errors.from_engine(400, "a -- b", "prompt").message == "a -- b"


def test_values_that_the_engine_adds_to_its_messages_are_left_out() -> None:
    for extra in ("(parameter=prompt, value=private\nwords)", "(value=private)", "(parameter=prompt)"):
        assert errors.from_engine(400, f"too long (by 5) {extra}", "prompt").message == "too long (by 5)"


def test_the_openai_client_asks_again_only_where_that_may_help() -> None:
    for error, times in ((ApiError(504, "too long"), 1), (errors.unavailable(), 3), (ApiError(400, "wrong"), 1)):
        asked: list[str] = []

        def answer(request: httpx.Request, error: ApiError = error, asked: list[str] = asked) -> httpx.Response:
            asked.append(request.url.path)
            headers = {**error.headers, **({"retry-after": "0.01"} if error.status == 503 else {})}
            return httpx.Response(error.status, json=error.body(), headers=headers)

        transport = httpx.Client(transport=httpx.MockTransport(answer))
        client = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=transport)
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x"}])
        assert len(asked) == times


def test_an_engine_that_dies_while_it_streams_is_reported_in_our_words() -> None:
    async def items() -> AsyncIterator[AnswerItem]:
        yield Failure(500, "EngineCore: see stack trace")

    async def read() -> list[str]:
        answer = Answer(PolicyApp("p"), items(), asyncio.get_running_loop().time() + 30, TokenCounter())  # type: ignore[arg-type]
        return [text async for text in _stream(Chunks(['data: {"choices": []}\n\n']), answer)]

    first, last = asyncio.run(read())
    assert first == 'data: {"choices": []}\n\n'
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "policy_unavailable"


class Replicas:
    """A policy application whose replicas answer, one call after another, with what `calls` say."""

    def __init__(self, *calls: list[Any]) -> None:
        self.calls, self.asked = list(calls), []
        self.chat = self

    async def handle(self, start_by: float) -> "Replicas":
        return self

    def remote(self, body: Any, info: Any, at_least: tuple[str, int]) -> Any:
        self.asked.append(at_least)
        items = self.calls.pop(0)

        async def answer() -> Any:
            for item in items:
                if isinstance(item, Exception):
                    raise item
                yield item

        return answer()


def ask(app: PolicyApp, replicas: Replicas, times: int = 1) -> list[Any]:
    """What a gateway in front of these replicas gets for `times` chats: first versions and first items."""
    ingress = PolicyIngress.__new__(PolicyIngress)
    ingress._config, ingress._policy, ingress.live = ServeConfig(api_keys=()), app, None
    app.handle = replicas.handle  # type: ignore[assignment,method-assign]

    async def opened() -> list[Any]:
        deadline = asyncio.get_running_loop().time() + 30

        def call(handle: Replicas) -> Answer:
            return Answer(app, handle.chat.remote(None, None, app.seen), deadline, TokenCounter())

        answers = [await ingress._opened(app, None, call, deadline) for _ in range(times)]  # type: ignore[arg-type]
        return [(weights.version, first) for _, weights, first in answers]

    return asyncio.run(opened())


def answered_by(version: int, sequence: int) -> AnsweredBy:
    return AnsweredBy(WeightsId("run-a", version), sequence)


def test_a_request_that_no_replica_takes_in_a_pause_is_told_so_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sampo_ray.serve.gateway.PATIENCE_S", 0.01)

    class Waiting:
        """A call that no replica takes."""

        async def __anext__(self) -> AnswerItem:
            await asyncio.sleep(600)
            raise StopAsyncIteration

        def cancel(self) -> None:
            pass

    async def asleep() -> bool:
        return True

    async def ask() -> None:
        coming: Any = Waiting()
        now = asyncio.get_running_loop().time()
        await Answer(PolicyApp("p", asleep), coming, now + 600, TokenCounter()).opened(now + 600)

    with pytest.raises(ApiError) as error:
        asyncio.run(ask())
    answer = error.value.response()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, str(errors.PAUSED_RETRY_S))
    assert json.loads(answer.body)["error"]["code"] == "policy_paused"


def test_a_request_whose_replica_died_before_it_said_anything_is_asked_of_another() -> None:
    replicas = Replicas(
        [RayActorError()],
        [answered_by(3, 1), RayActorError()],
        [answered_by(3, 1), Failure(500, "EngineCore died")],
        [answered_by(4, 2), Chunks(["data: hello\n\n"])],
    )
    assert ask(PolicyApp("p"), replicas) == [(4, Chunks(["data: hello\n\n"]))]


def test_it_is_not_asked_for_ever_and_a_mistake_of_the_user_only_once() -> None:
    with pytest.raises(ApiError) as gone:
        ask(PolicyApp("p"), Replicas(*[[RayActorError()]] * 4))
    assert gone.value.status == 503
    with pytest.raises(ApiError) as refused:
        ask(PolicyApp("p"), Replicas([answered_by(3, 1), Failure(400, "too long", "prompt")]))
    assert (refused.value.status, refused.value.param) == (400, "prompt")


def test_what_the_engine_has_computed_is_known_before_an_answer_that_is_not_streamed() -> None:
    counter, whole, app = TokenCounter(), Whole(CompletionRequest(prompt="x")), PolicyApp("p")
    replicas = Replicas([answered_by(3, 1), *(Progress(n * 100) for n in range(2000)), whole])

    async def first() -> Any:
        items: Any = replicas.remote(None, None, app.seen)
        answer = Answer(app, items, asyncio.get_running_loop().time() + 30, counter)
        await answer.opened(0)
        return await answer.next()

    assert asyncio.run(first()) is whole
    assert counter.generated == 199_900


def test_no_answer_begins_with_older_weights_than_an_answer_before_it_had() -> None:
    replicas = Replicas(
        *[[answered_by(v, s), Chunks(["x"])] for v, s in ((3, 1), (5, 2), (4, 3))], [answered_by(9, 1), Chunks(["x"])]
    )
    app = PolicyApp("p")
    ask(app, replicas, times=3)
    assert replicas.asked == [("", 0), ("run-a", 1), ("run-a", 2)]
    assert app.seen == ("run-a", 3)
    app.note(AnsweredBy(WeightsId("run-b", 0), 1))
    assert app.seen == ("run-b", 1), "another run has an order of its own"


def test_a_version_that_has_just_become_live_is_asked_of_replicas_that_have_it() -> None:
    app, replicas = PolicyApp("p"), Replicas([answered_by(12, 5), Chunks(["x"])], [answered_by(13, 6), Chunks(["x"])])
    app.handle = replicas.handle  # type: ignore[assignment,method-assign]
    app.note(answered_by(8, 4))

    async def target(model: str | None) -> Target:
        return Target("p", "policy", 12, LivePosition("run-a", 5))

    ingress: Any = PolicyIngress.__new__(PolicyIngress)
    ingress._config, ingress._policy, ingress._apps = ServeConfig(api_keys=()), app, {"p": app}
    ingress.catalogue, ingress.feedback_store = SimpleNamespace(target=target), SimpleNamespace(enabled=False)

    def ask() -> Any:
        body = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], model="policy@12")
        return asyncio.run(ingress._answer(body, "chat", TokenCounter()))

    assert ask().headers["x-policy-version"] == "12" and replicas.asked == [("run-a", 5)]
    with pytest.raises(ApiError, match="version 12 has just ceased to be live"):
        ask()


def test_pictures_do_not_slip_in_beside_tool_calls() -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://elsewhere.example"}}
    message = {"role": "assistant", "content": [picture], "tool_calls": [{"id": "1"}]}
    with pytest.raises(ApiError, match="content"):
        validated({"messages": [message]}, ChatCompletionRequest)


def test_lazy_parts_of_a_message_are_settled_so_that_it_can_travel() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = validated({"messages": [{"role": "user", "content": parts}]}, ChatCompletionRequest)
    assert pickle.loads(pickle.dumps(request)).messages[0]["content"] == parts


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EndpointError, match=rf"serve\.port={port}"):
            check_port(ServeConfig(port=port))
    assert free_port("127.0.0.1") > 0
