"""The ingress of the live policy: OpenAI's routes before a running policy application, each answer with its version.

The policy is another Serve application, so that it can also draw rollouts and neither redeploys the other.

`x-policy-version` and `x-policy-run` name the weights that an answer began with. When others were swapped in on the
way, the answer names them all and where they change, as `policy_versions`: in the body or, streaming, in the chunk with
which a choice ends. A request whose replica dies before anything was streamed is asked again of another one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Literal, cast

from fastapi import FastAPI, Request
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.llm.ingress import make_fastapi_ingress
from starlette.responses import JSONResponse, Response, StreamingResponse
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_incrementing

from sampo_ray.actors.policy import messages, sse
from sampo_ray.actors.weights.client import StoreState
from sampo_ray.config.serving import ServeConfig
from sampo_ray.errors import FleetError
from sampo_ray.internals.serve import app_handle, serve_status
from sampo_ray.run.versions import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.errors import ApiError, ReplicaLost, unavailable
from sampo_ray.serve.middleware.auth import Access, Authentication
from sampo_ray.serve.middleware.headers import SECURITY_HEADERS, ResponseHeaders, version_headers
from sampo_ray.serve.middleware.limits import MAX_IN_FLIGHT, LimitRequests, Limits, TokenCounter
from sampo_ray.serve.requests.openai import ChatCompletionRequest, CompletionRequest, read_request, without_tools
from sampo_ray.serve.routes.admin import ADMIN_ROUTES, AdminRoutes
from sampo_ray.serve.routes.feedback import FEEDBACK_ROUTES, FeedbackRoutes, FeedbackStore, pending_answer
from sampo_ray.serve.routes.page import PAGE_ROUTES, PageRoutes, RedirectToPage, load_assets

PATIENCE_S, HANDLE_POLL_S = 2.0, 0.5
STATUS_FRESH_S, STATUS_TIMEOUT_S = 1.0, 10.0
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


async def _never() -> bool:
    return False


class PolicyApp:
    """A Serve application of policy replicas, by name; it may start, die and come back while this object lives.
    `paused`: whether its replicas have left their GPUs to the training ranks.
    """

    def __init__(self, name: str, paused: Callable[[], Awaitable[bool]] = _never) -> None:
        self._name, self.paused = name, paused
        self._handle: DeploymentHandle | None = None
        self._status = CachedRead(lambda: asyncio.to_thread(self._look), STATUS_FRESH_S, STATUS_TIMEOUT_S)
        self.seen = messages.LivePosition()  # the latest that an answer has had; no answer begins earlier

    async def handle(self, start_by: float) -> DeploymentHandle:
        """ApiError (503) when the application is not deployed until `start_by` (event loop's clock)."""
        while self._handle is None:
            try:
                found = asyncio.to_thread(app_handle, self._name, STATUS_TIMEOUT_S)
                self._handle = (await found).options(stream=True)
            except (RayError, RayServeException, FleetError):
                if asyncio.get_running_loop().time() > start_by:
                    raise unavailable() from None
                await asyncio.sleep(HANDLE_POLL_S)
        return self._handle

    def note(self, seen: messages.AnsweredBy | messages.WeightsChanged) -> None:
        """Notes weights of which a client has seen an answer."""
        before = self.seen.sequence if self.seen.run == seen.weights.run else 0
        self.seen = messages.LivePosition(seen.weights.run, max(before, seen.sequence))

    async def up_and_runs(self) -> tuple[bool, bool]:
        """Whether a replica runs or Serve would start one, and whether one runs; looks at most once a second."""
        # While the controller restarts, replicas answer without it, and the last status still counts.
        with suppress(TimeoutError, RayError, FleetError):
            return await self._status.get()
        return self._status.last or (False, False)

    def _look(self) -> tuple[bool, bool]:
        app = serve_status(STATUS_TIMEOUT_S).applications.get(self._name)
        if app is None:
            return False, False
        runs = all(d.replica_states.get("RUNNING") for d in app.deployments.values())
        return runs or all(d.status == "HEALTHY" for d in app.deployments.values()), runs


class Answer:
    """The items of one streaming call, until `deadline` (event loop's clock). Its failures are ApiErrors. Serve cancels
    the call when the client goes away, this class when the endpoint itself gives up.
    """

    def __init__(
        self, policy: PolicyApp, items: DeploymentResponseGenerator, deadline: float, counter: TokenCounter
    ) -> None:
        self._policy, self._items, self._deadline, self._counter = policy, items, deadline, counter

    async def opened(self, start_by: float) -> messages.AnsweredBy:
        """The weights that answer: a replica's first item, sent at once. Waits for a replica until `start_by`."""
        first = asyncio.ensure_future(self._item())
        try:
            while not (await asyncio.wait({first}, timeout=PATIENCE_S))[0]:
                if await self._policy.paused():  # a replica says so at once, but there may be none
                    self._items.cancel()
                    raise errors.paused()
                if asyncio.get_running_loop().time() > start_by and not (await self._policy.up_and_runs())[1]:
                    self._items.cancel()
                    raise unavailable()
            answered_by = first.result()
            if isinstance(answered_by, messages.AnsweredBy):
                return answered_by
            raise ReplicaLost()
        finally:
            first.cancel()

    async def next(self) -> messages.Chunks | messages.Whole | None:
        """The next part of the answer; None at the end. Notes changed weights, and raises the engine's errors."""
        while (item := await self._item()) is not None:
            match item:
                case messages.WeightsChanged():
                    self._policy.note(item)
                case messages.Progress(tokens):
                    self._counter.generated = tokens
                case messages.Failure(status, message, param):
                    raise errors.from_engine(status, message, param)
                case messages.Chunks() | messages.Whole():
                    return item
        return None

    async def _item(self) -> messages.AnswerItem | None:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._items, None)
        except TimeoutError:
            self._items.cancel()
            raise ApiError(504, "the request took longer than this endpoint allows", code="timeout") from None
        except (RayError, RayServeException) as error:
            raise errors.from_policy(error) from None


class PolicyIngress(AdminRoutes, FeedbackRoutes, PageRoutes):
    """Answers for the Serve application `policy_app`, which serves the model `policy`, and for pinned versions.

    A request may take `request_timeout_s`, of which it waits at most `start_timeout_s` for a replica to run.
    """

    def __init__(self, policy_app: str, store: str, config: ServeConfig) -> None:
        self.live: WeightsId | None = None
        self.catalogue, self.assets, self._config = Catalogue(policy_app, store), load_assets(), config
        self.feedback_store = FeedbackStore(self.catalogue.run_place, config.feedback)
        self._policy = PolicyApp(policy_app, self._paused)
        self._apps = {policy_app: self._policy}

    def commanded(self, state: StoreState) -> None:
        """No answer from now on begins with weights that were live before the command."""
        if state.serving.live is not None and state.handed_out == state.serving.sequence:
            self._policy.note(messages.AnsweredBy(WeightsId(state.run, state.serving.live), state.serving.sequence))

    async def health(self) -> Response:
        """200 when a request would be answered, else 503."""
        if await self._paused():
            raise errors.paused()
        if not (await self._policy.up_and_runs())[0]:
            raise unavailable()
        return JSONResponse({"status": "ok"})

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": await self.catalogue.cards()})

    async def retrieve_model(self, model: str) -> Response:
        return JSONResponse(await self.catalogue.card(model))

    async def create_chat_completion(self, request: Request) -> Response:
        body = await read_request(request, ChatCompletionRequest, self._config.max_body_bytes)
        if self._config.tools is None:
            without_tools(body)
        return await self._answer(body, "chat", request.state.token_counter)

    async def create_completion(self, request: Request) -> Response:
        body = await read_request(request, CompletionRequest, self._config.max_body_bytes)
        return await self._answer(body, "completions", request.state.token_counter)

    async def _answer(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        method: Literal["chat", "completions"],
        counter: TokenCounter,
    ) -> Response:
        now = asyncio.get_running_loop().time()
        deadline = now + self._config.request_timeout_s
        start_by = min(deadline, now + self._config.start_timeout_s)
        target, asked_for = await self.catalogue.target(body.model), body.model
        body.model = target.engine_model
        policy = self._apps.setdefault(target.app, PolicyApp(target.app, self._paused))

        def call(handle: DeploymentHandle) -> Answer:
            at_least = target.position or policy.seen
            return Answer(policy, getattr(handle, method).remote(body, None, at_least), deadline, counter)

        answer, weights, first = await self._opened(policy, target.version, call, start_by)
        headers = version_headers(weights)
        pending = pending_answer(body, weights) if self.feedback_store.enabled else None
        if isinstance(first, messages.Whole):
            if pending:
                self.feedback_store.keep(pending.from_response(first.response))
            content = first.response.model_copy(update={"model": asked_for or body.model}).model_dump_json()
            return Response(content, media_type="application/json", headers=headers)
        stream = _stream(first, answer)
        if pending:
            stream = self.feedback_store.keep_stream(stream, pending)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _paused(self) -> bool:
        """Whether the training ranks use the GPUs of all that answers here."""
        with suppress(ApiError):  # the store has not answered yet
            return (await self.catalogue.state()).gpus == "ranks"
        return False

    @retry(
        retry=retry_if_exception_type(ReplicaLost),
        stop=stop_after_attempt(4),
        wait=wait_incrementing(start=0.2, increment=0.2),
        reraise=True,
    )
    async def _opened(
        self, policy: PolicyApp, version: int | None, call: Callable[[DeploymentHandle], Answer], start_by: float
    ) -> tuple[Answer, WeightsId, messages.Chunks | messages.Whole]:
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


async def _stream(first: messages.Chunks, answer: Answer) -> AsyncIterator[str]:
    part: messages.Chunks | messages.Whole | None = first
    try:
        while isinstance(part, messages.Chunks):
            yield "".join(part.events)
            part = await answer.next()
    except ApiError as error:  # the status line has been sent; OpenAI's clients look for this
        yield sse.event(error.body())


def build_endpoint_app(name: str, policy_app: str, store: str, config: ServeConfig, host: str) -> serve.Application:
    """The endpoint as a Serve application of one deployment, `name`, in front of the application `policy_app`, whose
    replicas follow the weight store of that name; `host`: where Serve listens. API keys travel as digests only.
    ValueError for an unusable key.
    """
    # A redirect would lead wherever the Host header says.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    errors.install(app)
    # The last one added sees a request first.
    app.add_middleware(RedirectToPage)
    app.add_middleware(ResponseHeaders, defaults=lambda: version_headers(_live_weights()))
    app.add_middleware(LimitRequests, limits=Limits.of(config))
    app.add_middleware(Authentication, access=Access.of(config, host))
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
