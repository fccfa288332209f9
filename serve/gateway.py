"""The ingress of the live policy: OpenAI's routes before a running policy application, each answer with its version.

It holds no weights and no engine. The policy is another Serve application, reached by name, so that one deployment can
play both roles (rollouts and endpoint) and so that neither redeploys the other.

`x-policy-version` and `x-policy-run` name the weights that an answer began with. When others were swapped in on the
way, the answer names them all and where they change, as `policy_versions`: in the body or, streaming, in a chunk before
the last line. A request whose replica dies before anything was streamed is asked again of another one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Literal, cast

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import make_fastapi_ingress
from starlette.responses import JSONResponse, Response, StreamingResponse
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_incrementing

from sampo_ray.actors.policy import sse
from sampo_ray.actors.policy.messages import AnsweredBy, Chunks, Whole
from sampo_ray.actors.weights.client import StoreState
from sampo_ray.config.sections import ServeConfig
from sampo_ray.run.version_folders import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.errors import ApiError, ReplicaLost
from sampo_ray.serve.middleware.auth import Access, Authentication
from sampo_ray.serve.middleware.headers import SECURITY_HEADERS, ResponseHeaders, version_headers
from sampo_ray.serve.middleware.limits import MAX_IN_FLIGHT, LimitRequests, Limits
from sampo_ray.serve.policy_app import Answer, PolicyApp
from sampo_ray.serve.requests.openai import ChatCompletionRequest, CompletionRequest, read_request
from sampo_ray.serve.routes.admin import ADMIN_ROUTES, AdminRoutes
from sampo_ray.serve.routes.feedback import FEEDBACK_ROUTES, FeedbackRoutes, FeedbackStore, pending_answer
from sampo_ray.serve.routes.page import PAGE_ROUTES, PageRoutes, RedirectToPage, load_assets

ROUTES = {
    **ADMIN_ROUTES,
    **FEEDBACK_ROUTES,
    **PAGE_ROUTES,
    "health": lambda app: app.get("/health"),
    "list_models": lambda app: app.get("/v1/models"),
    "retrieve_model": lambda app: app.get("/v1/models/{model:path}"),
    "create_chat_completion": lambda app: app.post("/v1/chat/completions"),
    "create_completion": lambda app: app.post("/v1/completions"),
}


class PolicyIngress(AdminRoutes, FeedbackRoutes, PageRoutes):
    """Answers for the Serve application `policy_app`, which serves the model `policy`, and for pinned versions.

    An answer has `request_timeout_s` from when its request is read to its last token, of which it waits at most
    `start_timeout_s` for a replica to run; when that passes, or the client goes away, its generation is cancelled.
    """

    def __init__(self, policy_app: str, store: str, config: ServeConfig) -> None:
        self.live: WeightsId | None = None
        self.catalogue = Catalogue(policy_app, store)
        self.feedback_store = FeedbackStore(self.catalogue.run_place, config.feedback)
        self._policy = PolicyApp(policy_app)
        self._apps = {policy_app: self._policy}
        self._config = config
        self.assets = load_assets()

    def commanded(self, state: StoreState) -> None:
        """No answer from now on begins with weights that were live before the command."""
        serving = state.serving
        if serving.live is not None:
            self._policy.note(AnsweredBy(WeightsId(state.run, serving.live), serving.sequence))

    async def health(self) -> Response:
        """200 when a request would be answered, else 503."""
        if not await self._policy.is_up():
            raise errors.unavailable()
        return JSONResponse({"status": "ok"})

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": await self.catalogue.cards()})

    async def retrieve_model(self, model: str) -> Response:
        return JSONResponse(await self.catalogue.card(model))

    async def create_chat_completion(self, request: Request) -> Response:
        body = await read_request(request, ChatCompletionRequest, self._config.max_body_bytes)
        return await self._answer(body, "chat")

    async def create_completion(self, request: Request) -> Response:
        body = await read_request(request, CompletionRequest, self._config.max_body_bytes)
        return await self._answer(body, "completions")

    async def _answer(
        self, body: ChatCompletionRequest | CompletionRequest, method: Literal["chat", "completions"]
    ) -> Response:
        now = asyncio.get_running_loop().time()
        deadline = now + self._config.request_timeout_s
        start_by = min(deadline, now + self._config.start_timeout_s)
        target, asked_for = await self.catalogue.target(body.model), body.model
        body.model = target.engine_model
        policy = self._apps.setdefault(target.app, PolicyApp(target.app))

        def call(handle: DeploymentHandle) -> Answer:
            return Answer(policy, getattr(handle, method).remote(body, None, policy.seen), deadline)

        answer, weights, first = await self._opened(policy, target.version, call, start_by)
        headers = version_headers(weights)
        pending = pending_answer(body, weights) if self.feedback_store.enabled else None
        if isinstance(first, Whole):
            if pending:
                self.feedback_store.keep(pending.from_response(first.response))
            content = first.response.model_copy(update={"model": asked_for or body.model}).model_dump_json()
            return Response(content, media_type="application/json", headers=headers)
        stream = _stream(first, answer)
        if pending:
            stream = self.feedback_store.keep_stream(stream, pending)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @retry(
        retry=retry_if_exception_type(ReplicaLost),
        stop=stop_after_attempt(4),
        wait=wait_incrementing(start=0.2, increment=0.2),
        reraise=True,
    )
    async def _opened(
        self, policy: PolicyApp, version: int | None, call: Callable[[DeploymentHandle], Answer], start_by: float
    ) -> tuple[Answer, WeightsId, Chunks | Whole]:
        """An answer, the weights it begins with, and its first part, from the first replica that gives one."""
        answer = call(await policy.handle(start_by))
        answered_by = await answer.opened(start_by)
        if version not in (None, answered_by.weights.version):
            raise ApiError(404, f"model: version {version} has just ceased to be live", param="model")
        policy.note(answered_by)
        if policy is self._policy:
            self.live = answered_by.weights
        first = await answer.next()
        if first is None:
            raise ReplicaLost()
        return answer, answered_by.weights, first


async def _stream(first: Chunks, answer: Answer) -> AsyncIterator[str]:
    part: Chunks | Whole | None = first
    try:
        while isinstance(part, Chunks):
            yield "".join(part.events)
            part = await answer.next()
    except ApiError as error:  # the status line has been sent; OpenAI's clients look for this
        yield sse.event(error.body())


def build_endpoint_app(name: str, policy_app: str, store: str, config: ServeConfig) -> serve.Application:
    """The endpoint as a Serve application of one deployment, `name`, in front of the application `policy_app`, whose
    replicas follow the weight store of that name.

    API keys travel as digests only. ValueError for an unusable key.
    """
    # A redirect would lead wherever the Host header says.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    errors.install(app)
    # The last one added sees a request first.
    app.add_middleware(RedirectToPage)
    app.add_middleware(ResponseHeaders, defaults=lambda: version_headers(_live_weights()))
    app.add_middleware(LimitRequests, limits=Limits.of(config))
    app.add_middleware(Authentication, access=Access.of(config))
    app.add_middleware(ResponseHeaders, defaults=lambda: SECURITY_HEADERS)
    ingress = make_fastapi_ingress(PolicyIngress, endpoint_map=ROUTES, app=app)
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=2 * MAX_IN_FLIGHT,  # of which the endpoint itself refuses all above half
        max_queued_requests=MAX_IN_FLIGHT,
        graceful_shutdown_timeout_s=config.request_timeout_s,  # answers in flight end first
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment(ingress).bind(policy_app, store, config.model_copy(update={"api_keys": ()}))


def _live_weights() -> WeightsId | None:
    return cast(PolicyIngress, serve.get_replica_context().servable_object).live
