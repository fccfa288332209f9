"""The Serve deployment class of policy replicas: vLLM for rollouts and the live endpoint, on weights that change."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

import pyarrow as pa
from pydantic import BaseModel
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.policy.answers import AnswersInFlight, answer_items
from sampo_ray.actors.policy.lifecycle import ReplicaEvent, RequestGate
from sampo_ray.actors.policy.messages import (
    AnsweredBy,
    AnswerItem,
    LivePosition,
    ReplicaStatus,
    RolloutRequest,
    WeightsChanged,
)
from sampo_ray.actors.policy.process import end_process, end_process_with, local_folder
from sampo_ray.actors.policy.replica_weights import LoadedWeights, ReplicaWeights, WeightsSource
from sampo_ray.actors.policy.rollouts import Rollouts
from sampo_ray.data.chat import ChatFormat
from sampo_ray.internals.serve_llm import EngineServer, use_local_folders
from sampo_ray.run.version_folders import WeightsId, adapter_folder, read_info

HEALTH_PERIOD_S = 0.2
ANY_POSITION = LivePosition()


class PolicyServer(EngineServer):
    """A vLLM replica that follows the weight store. It is ready once it holds the store's current weights.

    Handle methods: `generate` and `hold` (rollouts), `weights`, and those of LLMServer, of which `chat` and
    `completions` yield `AnswerItem`s (messages.py). When the engine dies, so does this process, so that Serve starts
    another.
    """

    async def __init__(self, llm_config: LLMConfig, *, source: WeightsSource, chat_folder: str) -> None:  # type: ignore[misc]
        self._source = source
        chat_folder = await asyncio.to_thread(local_folder, chat_folder)
        model_folder = await asyncio.to_thread(local_folder, llm_config.model_loading_config.model_source)
        use_local_folders(llm_config, model_folder, chat_folder)
        self._adapters, self._loading_adapter = set[str](), asyncio.Lock()
        await super().__init__(llm_config)
        self._gate, self._answers = RequestGate(), AnswersInFlight()
        self._weights = ReplicaWeights(self.client, source, self._gate, self._answers)
        self._rollouts = Rollouts(self.client, self._weights, self._gate, ChatFormat.load(chat_folder, "tokenizer"))
        await self._rollouts.warm_up()
        self._weights.advance(ReplicaEvent.ENGINE_UP)
        if source.pinned is None:
            await self._weights.catch_up()
        else:
            self._weights.pin(LoadedWeights(source.pinned, await asyncio.to_thread(read_info, model_folder), swaps=1))
        work = [self._watch()] if source.pinned else [self._watch(), self._weights.follow()]
        self._tasks = [end_process_with(asyncio.create_task(each)) for each in work]

    async def generate(self, prompts: pa.Table, rows: Sequence[int], request: RolloutRequest) -> pa.Table:
        """Samples completions for each of `rows` of a PROMPTS block; returns a COMPLETIONS block in order.

        Works on token ids: a completion's ids are those the engine sampled, with the end-of-turn token where it
        stopped. Log-probs are the model's own (nats, before temperature and top-p). Versions are those held when the
        request came and when it ended. Waits for `request.weights`; WeightsNotLoadedError if they do not come or have
        passed.
        """
        return await self._rollouts.generate(prompts, rows, request)

    async def hold(self, weights: WeightsId) -> None:
        """Waits for weights that are on their way. WeightsNotLoadedError if they do not come, or have passed.

        Calls that wait make Serve start replicas before there is work for them.
        """
        await self._weights.wait_for(weights)

    async def weights(self) -> ReplicaStatus:
        """Which weights this replica holds, and its state."""
        return self._weights.status

    async def chat(
        self, request: ChatCompletionRequest, raw_request_info: object = None, at_least: LivePosition = ANY_POSITION
    ) -> AsyncGenerator[AnswerItem, None]:
        """Answers with weights not older than `at_least`; WeightsNotLoadedError when they do not come soon."""
        return self._answer(super().chat, request, raw_request_info, at_least)

    async def completions(
        self, request: CompletionRequest, raw_request_info: object = None, at_least: LivePosition = ANY_POSITION
    ) -> AsyncGenerator[AnswerItem, None]:
        return self._answer(super().completions, request, raw_request_info, at_least)

    async def check_health(self) -> None:
        try:
            await super().check_health()
        except EngineDeadError as error:
            end_process(f"the engine died: {error}")

    async def __del__(self) -> None:
        if getattr(self, "_tasks", None):
            self._weights.advance(ReplicaEvent.DRAIN)
            for task in self._tasks:
                task.cancel()
            self._weights.leave()
        await super().__del__()

    async def _answer(
        self,
        respond: Callable[..., Awaitable[AsyncGenerator[list[str] | BaseModel, None]]],
        request: ChatCompletionRequest | CompletionRequest,
        raw_request_info: object,
        at_least: LivePosition,
    ) -> AsyncGenerator[AnswerItem, None]:
        await self._weights.wait_until_at(at_least)
        if request.model != self.model_id and self._source.adapters:
            await self._require_adapter(self._source.adapters, request.model)
        async with self._gate.request():
            weights = self._weights_of(request.model)
            request.cache_salt = f"{weights.salt}/{request.cache_salt or ''}"
            request.request_id = os.urandom(16).hex()  # a user's may not be unique, and a request may come again
            with self._answers.track(request.request_id, weights.id.version) as spans:
                yield AnsweredBy(weights.id, weights.sequence)
                items = answer_items(await respond(request, raw_request_info), spans, self._changed)
                async with contextlib.aclosing(items):
                    async for item in items:
                        yield item

    def _changed(self) -> WeightsChanged:
        return WeightsChanged(self._weights.loaded.id, self._weights.loaded.sequence)

    async def _require_adapter(self, run: str, model: str) -> None:
        """Loads the adapter that the model name `policy@NAME` means, unless it is loaded already."""
        async with self._loading_adapter:
            if model in self._adapters:
                return
            folder = adapter_folder(run, model.partition("@")[2])
            await self.load_adapter(model, await asyncio.to_thread(local_folder, folder))
            self._adapters.add(model)

    def _weights_of(self, model: str) -> LoadedWeights:
        """What answers for a model name: the weights held, or a version of adapters alone on them."""
        name = model.partition("@")[2]
        loaded = self._weights.loaded
        if not self._source.adapters or not name.isdecimal():
            return loaded
        return replace(loaded, id=WeightsId(loaded.id.run, int(name)))

    async def _watch(self) -> None:
        # Serve wants three failed checks, 10 s apart, and its routing prefers a replica that fails fast.
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self.check_health()
