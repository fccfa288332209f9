"""The ingress of the live policy: OpenAI's routes before a running policy application, each answer with its version.

It holds no weights and no engine. The policy is another Serve application, reached by name, so that one deployment can
play both roles (rollouts and endpoint) and so that neither redeploys the other.

`x-policy-version` and `x-policy-run` name the weights that an answer began with. When others were swapped in on the
way, the answer names those too, as `policy_version`: in the body or, streaming, in a chunk before the last line.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from sampo_ray.actors.weights import WeightsId
from sampo_ray.config import ServeConfig
from sampo_ray.serve import bodies, errors, stamp
from sampo_ray.serve.auth import KeyGuard, digests
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.policy_app import Answer, PolicyApp

MODEL = "policy"
ROUTES = {
    "health": lambda app: app.get("/health"),
    "list_models": lambda app: app.get("/v1/models"),
    "retrieve_model": lambda app: app.get("/v1/models/{model:path}"),
    "create_chat_completion": lambda app: app.post("/v1/chat/completions"),
    "create_completion": lambda app: app.post("/v1/completions"),
}


class PolicyIngress(OpenAiIngress):
    """Answers for the Serve application `policy_app`, which serves the model `policy`.

    An answer has `request_timeout_s` from when its request is read to its last token; when that passes, or the client
    goes away, its generation is cancelled. While no replica of the policy runs, requests are refused (503) rather than
    kept waiting.
    """

    def __init__(self, policy_app: str, max_body_bytes: int, request_timeout_s: float) -> None:
        super().__init__(llm_deployments={}, model_cards={})
        self.live: WeightsId | None = None
        self._policy = PolicyApp(policy_app)
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._created = int(time.time())

    async def health(self) -> Response:
        """200 when a request would be answered, else 503."""
        if not await self._policy.is_up():
            raise errors.unavailable()
        return JSONResponse({"status": "ok"})

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [await self._card()]})

    async def retrieve_model(self, model: str) -> Response:
        await self._get_model_id(model)
        return JSONResponse(await self._card())

    async def create_chat_completion(self, request: Request) -> Response:
        body = await bodies.read(request, ChatCompletionRequest, self._max_body_bytes)
        return await self._process_llm_request(body, "chat")

    async def create_completion(self, request: Request) -> Response:
        body = await bodies.read(request, CompletionRequest, self._max_body_bytes)
        return await self._process_llm_request(body, "completions")

    async def _get_model_id(self, model: str | None) -> str:
        if model not in (None, MODEL):
            message = f"model: no model of that name; this endpoint has {MODEL!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return MODEL

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        return self._policy.handle()

    async def _process_llm_request(
        self, body: ChatCompletionRequest | CompletionRequest, call_method: str, raw_request: Request | None = None
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self._request_timeout_s
        body.model = await self._get_model_id(body.model)
        handle = self._get_configured_serve_handle(body.model)
        answer = Answer(getattr(handle, call_method).remote(body), deadline)
        weights = self.live = await answer.opened(self._policy)
        first = await answer.next()
        _raise_if_error(first[0] if isinstance(first, list) else first)
        headers = stamp.headers(weights)
        if isinstance(first, BaseModel):
            return Response(first.model_dump_json(), media_type="application/json", headers=headers)
        return StreamingResponse(_stream(first, answer), media_type="text/event-stream", headers=headers)

    async def _card(self) -> dict[str, Any]:
        weights = await self._policy.weights()
        self.live = WeightsId(weights["run"], weights["version"])
        card = {"id": MODEL, "object": "model", "created": self._created, "owned_by": "sampo-ray"}
        return {**card, "metadata": weights}


async def _stream(first: list[str], answer: Answer) -> AsyncIterator[str]:
    chunks: list[str] | None = first
    try:
        while chunks is not None:
            for chunk in chunks:
                _raise_if_error(chunk)
            yield "".join(chunks)
            chunks = await answer.next()
    except ApiError as error:  # the status line has been sent; OpenAI's clients look for this
        yield f"data: {json.dumps(error.body())}\n\n"


def _raise_if_error(first: Any) -> None:
    """An engine's error comes as an object or as text of the stream; no item at all means that it fell silent."""
    if first is None:
        raise errors.unavailable()
    if isinstance(first, str) and first.startswith('data: {"error"'):
        first = ErrorResponse.model_validate_json(first.removeprefix("data: "))
    if isinstance(first, ErrorResponse):
        raise errors.from_engine(first.error.code, first.error.message, first.error.param)


def build_endpoint_app(name: str, policy_app: str, config: ServeConfig) -> serve.Application:
    """The endpoint as a Serve application of one deployment, `name`, in front of the running application `policy_app`.

    API keys travel as digests only. ValueError for an unusable key.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(stamp.Stamp, live=_live_weights)
    app.add_middleware(KeyGuard, known=digests(config.api_keys))  # outermost: nothing happens before it agrees
    ingress = make_fastapi_ingress(PolicyIngress, endpoint_map=ROUTES, app=app)
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=1024,
        max_queued_requests=1024,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment(ingress).bind(policy_app, config.max_body_bytes, config.request_timeout_s)


def _live_weights() -> WeightsId | None:
    return cast(PolicyIngress, serve.get_replica_context().servable_object).live
