"""The Serve deployment of policy replicas, vLLM for rollouts and the live endpoint, on weights that change."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

import pyarrow as pa
import torch
from pydantic import BaseModel
from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.nodes import ANYWHERE, Where
from sampo_ray.actors.policy.adapters import ENGINE_S, ReplicaAdapters
from sampo_ray.actors.policy.answers import (
    Rollouts,
    answer_items,
    with_model_name,
    with_progress,
    with_progress_between,
)
from sampo_ray.actors.policy.constraints import Constraints
from sampo_ray.actors.policy.lifecycle import (
    AnswersInFlight,
    ReplicaEvent,
    RequestGate,
    TokensSoFar,
    end_process,
    end_process_with,
    tokens_by_choice,
)
from sampo_ray.actors.policy.messages import AnsweredBy, AnswerItem, LivePosition, ReplicaStatus, RolloutRequest
from sampo_ray.actors.policy.replica_weights import LoadedWeights, ReplicaWeights, WeightsSource
from sampo_ray.actors.policy.turns import EngineTurns
from sampo_ray.actors.transfer.backend import BACKEND
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.tools import tool_arguments
from sampo_ray.errors import ConfigError, WeightsError
from sampo_ray.internals.logical_gpus import logical_gpus
from sampo_ray.internals.serve_llm import EngineServer, use_local_folders
from sampo_ray.internals.torch import cpu_has_bf16
from sampo_ray.internals.vllm import check_constraints, constraint_trial, requests_in_flight
from sampo_ray.run.node_copies import version_on_disk
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId, read_info

HEALTH_PERIOD_S = 0.2
ANY_POSITION = LivePosition()
SLOTS = 4
"""Adapters that may share a batch; others wait for the next."""
NOT_KEPT = (
    "this vLLM would answer requests for a version with the weights of an adapter on it, so that no adapter is served; "
    "install a version of vLLM that requirements/ names"
)


class PolicyServer(EngineServer):
    """A vLLM replica that follows the weight store. It is ready once it holds the store's current weights. When the
    engine dies, so does this process, so that Serve starts another.
    """

    async def __init__(self, llm_config: LLMConfig, *, source: WeightsSource, chat_folder: str) -> None:  # type: ignore[misc]
        self._source = source
        self._turns = EngineTurns(source.store) if source.takes_turns else None
        if self._turns:
            await self._turns.may_start()
        chat_folder = await asyncio.to_thread(local_folder, chat_folder)
        model_folder = await asyncio.to_thread(local_version, llm_config.model_loading_config.model_source)
        use_local_folders(llm_config, model_folder, chat_folder)
        await super().__init__(llm_config)
        check_constraints(self.client, Constraints(lambda: constraint_trial(self.client)).check)
        self._adapters = await self._adapters_of(source.adapters) if source.adapters else None
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
        work += [self._adapters.follow()] if self._adapters else []
        self._tasks = [end_process_with(asyncio.create_task(each)) for each in work]
        if self._turns:
            self._turns.follow(self._weights.sleep, self._weights.wake)

    async def _adapters_of(self, run: str) -> ReplicaAdapters:
        if not all(await asyncio.wait_for(self.client.collective_rpc("base_is_kept"), ENGINE_S)):
            raise WeightsError(NOT_KEPT)
        copies = COPIES.enter_context(scratch_folder())
        return ReplicaAdapters(Place(run), copies, self.load_adapter, self.unload_adapter)

    async def generate(self, prompts: pa.Table, rows: Sequence[int], request: RolloutRequest) -> pa.Table:
        """See `Rollouts.generate`."""
        return await self._rollouts.generate(prompts, rows, request)

    async def hold(self, weights: WeightsId) -> None:
        """Waits as `generate` does. Calls that wait make Serve start replicas before there is work for them."""
        await self._weights.wait_for(weights)

    async def weights(self) -> ReplicaStatus:
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
        # Serve may stop a replica that is starting, and then has not all of its parts, or one that is loading.
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if turns := getattr(self, "_turns", None):
            await asyncio.to_thread(turns.close)
        if (weights := getattr(self, "_weights", None)) is not None:
            weights.end()
        await super().__del__()
        await asyncio.to_thread(COPIES.close)

    async def _answer(
        self,
        respond: Callable[..., Awaitable[AsyncGenerator[list[str] | BaseModel, None]]],
        request: ChatCompletionRequest | CompletionRequest,
        raw_request_info: object,
        at_least: LivePosition,
    ) -> AsyncGenerator[AnswerItem, None]:
        self._gate.refuse_in_pause()  # which may be longer than anybody waits
        await self._weights.wait_until_at(at_least)
        model = request.model
        async with self._adapter(model), self._gate.request(waits=False):
            weights = self._weights_of(model)
            request.cache_salt = f"{weights.salt}/{request.cache_salt or ''}"
            request.request_id = os.urandom(16).hex()  # a user's may not be unique, and a request may come again
            with self._answers.track(request.request_id, weights.id.version) as spans:
                yield AnsweredBy(weights.id, weights.sequence)
                items = answer_items(await respond(request, raw_request_info), spans, self._weights.changed)
                progress = with_progress_between if request.stream else with_progress
                items = progress(items, self._tokens_of(request.request_id))
                async with contextlib.aclosing(items):
                    async for item in items:
                        yield with_model_name(item, model, model.partition("#")[0])

    def _tokens_of(self, request_id: str) -> Callable[[], int]:
        so_far = TokensSoFar()
        return lambda: so_far.update(tokens_by_choice(request_id, requests_in_flight(self.client)))

    def _adapter(self, model: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a request for this model name."""
        if self._adapters is None or model == self.model_id:
            return contextlib.nullcontext()
        return self._adapters.using(model)

    def _weights_of(self, model: str) -> LoadedWeights:
        """What answers for a model name: the weights held, or a version of adapters alone on them."""
        name, loaded = model.partition("@")[2], self._weights.loaded
        if self._adapters is None or not name.isdecimal():
            return loaded
        return replace(loaded, id=WeightsId(loaded.id.run, int(name)))

    async def _watch(self) -> None:
        # Serve wants three failed checks, 10 s apart, and its routing prefers a replica that fails fast.
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self.check_health()


COPIES = contextlib.ExitStack()
"""This process's copies of remote folders and of adapters. They end with it; if it was killed, once the next process on
this machine needs such a folder."""


def local_folder(url: str) -> str:
    """The path of a folder on this machine; a remote one is copied."""
    return str(COPIES.enter_context(Place(url).on_disk()))


def local_version(url: str) -> str:
    """The path of a version's folder on this machine; of a remote one, of the copy that all replicas here share."""
    return str(COPIES.enter_context(version_on_disk(url)))


def cpu_engine(max_model_len: int) -> dict[str, object]:
    """vLLM's settings where there is no GPU: nothing is compiled, prompts are not cut, and arithmetic that the CPU has.

    Where a CPU has no bf16 instructions, vLLM's products of bf16 matrices were measured 7 times slower than fp32 ones
    (64 rows); the weights are the same numbers in both. vLLM 0.29 rewinds the random generator of a seeded request
    whose prompt it cuts into chunks, which on a CPU kills the engine ("CPU Generator does not use offset").
    """
    return {
        "dtype": "bfloat16" if cpu_has_bf16() else "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 4096),
    }


def cpu_environment() -> dict[str, str]:
    """Environment of an engine on CPUs: as many threads as the caller has (`OMP_NUM_THREADS`), on any core.

    By default vLLM keeps a core free and ties all engines of a machine to the same other ones: on two cores a 135M
    model had 80 tokens/s instead of 132, and two engines took 39 s to start instead of 24. glibc's settings keep freed
    memory in the process, so that a swap can use that of the weights before.
    """
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads()), **kept}


def policy_deployment(
    model_id: str,
    model_folder: str,
    chat_folder: str,
    source: WeightsSource,
    config: GeneratorsConfig,
    max_model_len: int,
    where: Where = ANYWHERE,
) -> serve.Application:
    """Policy replicas that serve `source`, whose store must run, as `model_id`; on GPUs if `config` has any.

    `model_folder` is a complete version (the one to pin, or 000000 until the store's weights are loaded), `chat_folder`
    the run's tokenizer. Both are paths or fsspec URLs that every node reaches.
    """
    gpus = config.num_gpus or 0
    on_cpus = not gpus or logical_gpus()
    asked = {"num_cpus": 1 if config.num_cpus is None else config.num_cpus, **where.memory_option}
    llm_config = LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model_folder},
        accelerator_config={"kind": "cpu" if on_cpus else "gpu"},
        placement_group_config={"bundle_per_worker": {"GPU": gpus} if gpus else {"CPU": 0}},
        deployment_config={"ray_actor_options": asked},
        # By default Ray sends tokens every 50 ms; where a token takes longer, that is only a delay.
        experimental_configs={"stream_batching_interval_ms": 0} if on_cpus else {},
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", **(cpu_environment() if on_cpus else {})}},
        engine_kwargs={"tokenizer": chat_folder, **engine_arguments(source, config, max_model_len)},
    )
    options = {
        "name": "policy",
        "autoscaling_config": config.autoscaling,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": source.drain_s,  # answers in flight end before the replica does
    }
    options |= {"placement_group_bundle_label_selector": [dict(where.labels)]} if where.labels else {}
    bound = {"source": source, "chat_folder": chat_folder}
    return build_llm_deployment(
        llm_config, bind_kwargs=bound, override_serve_options=options, deployment_cls=PolicyServer
    )


def with_tools(config: GeneratorsConfig, tools: str | None, tokenizer: Place) -> GeneratorsConfig:
    """The settings of replicas that answer requests with tools (`serve.tools`), for a run's tokenizer folder.
    ConfigError where its chat template or its tokens are not for them."""
    if tools is None:
        return config
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    arguments = tool_arguments(tools, chat.tokenizer)
    try:
        ToolParserManager.get_tool_parser(str(arguments["tool_call_parser"]))(chat.tokenizer)
    except (RuntimeError, ValueError) as error:  # the engine would find it at the first request
        raise ConfigError(f"serve.tools={tools!r}: this parser is for other tokenizers ({error})") from None
    return config.with_engine(arguments)


def engine_arguments(source: WeightsSource, config: GeneratorsConfig, max_model_len: int) -> dict[str, object]:
    """vLLM's engine arguments; those of `config.engine` come last."""
    on_gpus = config.num_gpus and not logical_gpus()
    return {
        "max_model_len": max_model_len,
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "logprobs_mode": "raw_logprobs",  # the model's own, whatever a request samples with
        "worker_extension_cls": "sampo_ray.actors.transfer.backend.WorkerExtension",
        "weight_transfer_config": {"backend": BACKEND},
        # Named, because vLLM would otherwise keep for good the backend that the first such request happens to need.
        "structured_outputs_config": {"backend": "xgrammar"},
        **({"enable_lora": True, "max_lora_rank": source.max_rank, "max_loras": SLOTS} if source.adapters else {}),
        **({"enable_sleep_mode": True} if source.takes_turns and on_gpus else {}),
        **({"dtype": "bfloat16"} if on_gpus else cpu_engine(max_model_len)),
        **config.engine,
    }
