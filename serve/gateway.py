"""The ingress of the live policy: OpenAI's routes in front of a running policy application, every answer with its version.

It holds no weights and no engine. The policy is another Serve application, reached by name, so that one deployment can play
both roles (rollouts and endpoint) and so that neither redeploys the other.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from sampo_ray.config import ServeConfig
from sampo_ray.serve import bodies, errors
from sampo_ray.serve.auth import KeyGuard, digests
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.policy_app import PolicyApp, next_item
from sampo_ray.serve.stamp import Stamp, VersionStamp

PATIENCE_S = 2.0
ROUTES = {
    "health": lambda app: app.get("/health"),
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
}


class PolicyIngress(OpenAiIngress):
    """Answers for the policy application `policy_app`.

    A request has `request_timeout_s` from arrival to its last token; when that passes, or the client goes away, its
    generation is cancelled. While no replica of the policy runs, requests are refused (503) rather than kept waiting.
    """

    def __init__(self, policy_app: str, max_body_bytes: int, request_timeout_s: float) -> None:
        super().__init__(llm_deployments={}, model_cards={})
        self.stamp = VersionStamp()
        self._policy = PolicyApp(policy_app)
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._created = int(time.time())

    async def health(self) -> Response:
        """200 when a request would be answered, else 503."""
        if not await self._policy.is_up():
            raise errors.unavailable()
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [await self._card()]})

    async def model_data(self, model: str) -> Response:
        await self._get_model_id(model)
        return JSONResponse(await self._card())

    async def chat(self, request: Request) -> Response:
        body = await bodies.read(request, ChatCompletionRequest, self._max_body_bytes)
        return await self._process_llm_request(body, "chat")

    async def completions(self, request: Request) -> Response:
        body = await bodies.read(request, CompletionRequest, self._max_body_bytes)
        return await self._process_llm_request(body, "completions")

    async def _get_model_id(self, model: str | None) -> str:
        if model not in (None, bodies.MODEL):
            message = f"model: no model of that name; this endpoint has {bodies.MODEL!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return bodies.MODEL

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        return self._policy.handle()

    async def _process_llm_request(
        self, body: ChatCompletionRequest | CompletionRequest, call_method: str, raw_request: Request | None = None
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self._request_timeout_s
        body.model = await self._get_model_id(body.model)
        handle = self._get_configured_serve_handle(body.model)
        items = getattr(handle, call_method).remote(body)
        try:
            first = await self._first_item(items, deadline)
        except BaseException:
            items.cancel()
            raise
        if isinstance(first, ErrorResponse):
            self.stamp.see(first.model_extra)
            raise errors.from_engine(first.error.code, first.error.message, first.error.param)
        if isinstance(first, BaseModel):
            headers = self.stamp.see(first.model_extra)
            return Response(first.model_dump_json(), media_type="application/json", headers=headers)
        chunk = _first_chunk(first)
        headers = self.stamp.see(chunk)
        if "error" in chunk:
            items.cancel()
            raise errors.from_engine(chunk["error"].get("code", 500), chunk["error"].get("message", ""))
        return StreamingResponse(_stream(first, items, deadline), media_type="text/event-stream", headers=headers)

    async def _first_item(self, items: DeploymentResponseGenerator, deadline: float) -> Any:
        """The answer, or its first chunks; gives up early when there is no replica that could give them."""
        pending = asyncio.ensure_future(next_item(items, deadline))
        try:
            while not (await asyncio.wait({pending}, timeout=PATIENCE_S))[0]:
                if not await self._policy.is_up():
                    raise errors.unavailable()
            return pending.result()
        finally:
            pending.cancel()

    async def _card(self) -> dict[str, Any]:
        self.stamp.see(await self._policy.version())
        card = {"id": bodies.MODEL, "object": "model", "created": self._created, "owned_by": "sampo-ray"}
        return {**card, "metadata": self.stamp.fields()}


def _first_chunk(item: list[str] | str) -> dict[str, Any]:
    """The first JSON object of server-sent events; a batch of them comes as a list."""
    text = item if isinstance(item, str) else item[0]
    return json.loads(text.removeprefix("data: "))


async def _stream(first: list[str] | str, items: DeploymentResponseGenerator, deadline: float) -> AsyncIterator[str]:
    item: list[str] | str | None = first
    try:
        while item is not None:
            yield "".join(item)
            item = await next_item(items, deadline)
    except ApiError as error:  # the status line is gone by now
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        if item is not None:
            items.cancel()


def build_endpoint_app(name: str, policy_app: str, config: ServeConfig) -> serve.Application:
    """The endpoint as a Serve application (one deployment, `name`) in front of the running application `policy_app`.

    Keys travel as digests only. ValueError for an unusable key.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(Stamp, fields=_live_fields)
    app.add_middleware(KeyGuard, known=digests(config.api_keys))  # the outermost: nothing is read before it agrees
    ingress = make_fastapi_ingress(PolicyIngress, endpoint_map=ROUTES, app=app)
    options = {"num_cpus": 0.1}
    deployment = serve.deployment(
        ingress, name=name, max_ongoing_requests=1024, max_queued_requests=1024, ray_actor_options=options
    )
    return deployment.bind(policy_app, config.max_body_bytes, config.request_timeout_s)


def _live_fields() -> dict[str, str]:
    return serve.get_replica_context().servable_object.stamp.headers()
