"""Policy replicas: vLLM under Ray Serve, for rollouts and for the live endpoint, on weights that change under way."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import xxhash
from ray import serve
from ray.exceptions import RayError
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm import SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.weight_transfer import BACKEND, staged
from sampo_ray.actors.weights import Bucket, Weights, WeightsError, WeightsId, find_weight_store, verify
from sampo_ray.chat import ChatFormat
from sampo_ray.config import GeneratorsConfig

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files

POLL_S = 30.0
RETRY_S = 2.0
FETCH_TIMEOUT_S = 300.0
SWAP_TIMEOUT_S = 120.0
HEALTH_PERIOD_S = 0.2
FIRST_WEIGHTS_TIMEOUT_S = 600.0
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Held:
    """The weights that an engine computes with, and how many it has had before them."""

    id: WeightsId
    about: dict[str, Any]
    swaps: int

    @property
    def salt(self) -> str:
        """Keeps prefix blocks of other weights apart; `swaps` makes a return to earlier weights a new salt as well."""
        return f"{self.id}#{self.swaps}"


class PolicyServer(LLMServer):
    """A vLLM replica that follows the weight store. Ready only once it holds the store's current weights.

    Handle methods: `generate` (rollouts), `weights`, and what LLMServer brings. `chat` and `completions` tell which
    weights answered:

    * the first item they yield is a `WeightsId`: the weights held when the request came (before an error, too);
    * then come the items that LLMServer yields (lists of SSE strings, or one response object, or an ErrorResponse);
    * if other weights were swapped in on the way, the answer names them in a field `policy_version` (int): in the body,
      or, streaming, in one more chunk without choices right before `data: [DONE]`. No such field: nothing changed.

    A swap pauses the engine, loads, and resumes; requests in flight keep their KV cache. An engine whose update failed
    half-way, or that died, ends this process, so that Serve starts another: it never serves half-loaded weights.
    """

    async def __init__(self, llm_config: LLMConfig, *, store: str, chat_folder: str) -> None:  # type: ignore[misc]
        self._store_name = store
        self._format = ChatFormat.load(chat_folder, "tokenizer")
        self._held = Held(WeightsId("", -1), {}, 0)  # nothing that a store would know
        await super().__init__(llm_config)
        self._client = self.engine._engine_client  # vLLM's AsyncLLM; LLMServer has no way to send token ids
        await self._client.init_weight_transfer_engine(WeightTransferInitRequest({}))
        await self._warm_up()
        await self._catch_up()
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._watch())]
        for task in self._tasks:
            task.add_done_callback(ended)

    async def generate(
        self,
        prompts: pa.Table,
        rows: Sequence[int],
        samples: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        weights: tuple[str, int] | None = None,
    ) -> pa.Table:
        """Samples `samples` completions for each of `rows` of a PROMPTS block; returns a COMPLETIONS block in order.

        Works on token ids: a completion's ids are those the engine sampled, the end-of-turn token included where it
        stopped. A draw's seed depends on (seed, prompt id, sample) alone; `temperature` 0 is greedy. Log-probs are the
        model's own (nats, before temperature and top-p). Versions: those held when the request came and when it ended.
        `weights` (run, version): waits until the replica holds them; WeightsError if they do not come or have passed.
        """
        if weights is not None:
            await self._hold(WeightsId(*weights))
        chosen = prompts.take(list(rows))
        items = [
            self._complete(ids, sampling_params(temperature, top_p, max_tokens, seed, key, sample, self._end_of_turn))
            for key, ids in zip(chosen["id"].to_pylist(), chosen["prompt"].to_pylist(), strict=True)
            for sample in range(samples)
        ]
        completions = await asyncio.gather(*items)
        outputs = [output for output, _, _ in completions]
        ids = [list(output.token_ids) for output in outputs]
        repeated = chosen.take([row for row in range(len(chosen)) for _ in range(samples)])
        columns = {
            "sample": pa.array(list(range(samples)) * len(chosen), pa.int32()),
            "completion": pa.array(ids, pa.list_(pa.int32())),
            "text": pa.array([self._format.text(each) for each in ids], pa.string()),
            "finish_reason": pa.array([output.finish_reason for output in outputs], pa.string()),
            "logprobs": pa.array([sampled_logprobs(output) for output in outputs], pa.list_(pa.float32())),
            "first_version": pa.array([first.version for _, first, _ in completions], pa.int64()),
            "last_version": pa.array([last.version for _, _, last in completions], pa.int64()),
        }
        for name, column in columns.items():
            repeated = repeated.append_column(name, column)
        return repeated

    async def weights(self) -> dict[str, Any]:
        """Which weights this replica holds: run, version, round, step."""
        about = {key: self._held.about.get(key) for key in ("round", "step")}
        return {"run": self._held.id.run, "version": self._held.id.version, **about}

    async def chat(self, request: ChatCompletionRequest, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._versioned(super().chat, request, raw_request_info)

    async def completions(self, request: CompletionRequest, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._versioned(super().completions, request, raw_request_info)

    async def check_health(self) -> None:
        try:
            await super().check_health()
        except EngineDeadError as error:
            end_process(f"the engine died: {error}")

    @property
    def _end_of_turn(self) -> int:
        return self._format.end_of_turn_id

    async def _versioned(self, method: Any, request: Any, raw_request_info: Any) -> AsyncGenerator[Any, None]:
        first, previous = self._held, ""
        request.cache_salt = f"{first.salt}/{request.cache_salt or ''}"
        yield first.id
        async for item in await method(request, raw_request_info):
            changed = self._held.id != first.id
            if isinstance(item, list):
                if changed and item[-1] == DONE:
                    item.insert(-1, version_chunk([previous, *item][-2], self._held.id.version))
                previous = item[-1]
            elif changed and hasattr(item, "choices"):
                item.policy_version = self._held.id.version
            yield item

    async def _complete(
        self, prompt: list[int], params: SamplingParams
    ) -> tuple[CompletionOutput, WeightsId, WeightsId]:
        first = self._held
        request = TokensPrompt(prompt_token_ids=prompt, cache_salt=first.salt)
        try:
            async for output in self._client.generate(request, params, request_id=os.urandom(16).hex()):
                final = output
        except EngineDeadError as error:
            end_process(f"the engine died: {error}")
        return final.outputs[0], first.id, self._held.id

    async def _hold(self, wanted: WeightsId) -> None:
        """Waits for weights that are on their way. WeightsError when they do not come, or newer ones are in already."""
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        while self._held.id != wanted:
            passed = self._held.id.run == wanted.run and self._held.id.version > wanted.version
            if passed or time.monotonic() > deadline:
                raise WeightsError(f"rollouts were asked for from {wanted}, but this replica holds {self._held.id}")
            await asyncio.sleep(0.01)

    async def _warm_up(self) -> None:
        """Makes the engine compile what rollouts and endpoint use; the first batches cost many seconds otherwise."""
        prompt = [self._end_of_turn] * 8
        both = [sampling_params(t, 0.9, 8, 0, "warm-up", n, self._end_of_turn) for t in (0.0, 1.0) for n in range(4)]
        await asyncio.gather(*(self._complete(prompt, params) for params in both))

    async def _catch_up(self) -> None:
        """Loads the store's current weights, again until there are no newer ones. WeightsError if it never has any."""
        deadline = time.monotonic() + FIRST_WEIGHTS_TIMEOUT_S
        weights = await self._newer(POLL_S)
        while weights or self._held.id.version < 0:
            if weights:
                await self._adopt(weights)
            elif time.monotonic() > deadline:
                waited = f"{FIRST_WEIGHTS_TIMEOUT_S:.0f} s"
                raise WeightsError(
                    f"weight store {self._store_name!r} has had no weights for {waited}; publish version 0"
                )
            weights = await self._newer(0 if self._held.id.version >= 0 else POLL_S)

    async def _newer(self, timeout_s: float) -> Weights | None:
        known = self._held.id if self._held.id.version >= 0 else None
        waiting = find_weight_store(self._store_name).wait.remote(known, timeout_s)
        return await asyncio.wait_for(waiting, timeout_s + FETCH_TIMEOUT_S)

    async def _follow(self) -> None:
        while True:
            try:
                weights = await self._newer(POLL_S)
                if weights:
                    await self._adopt(weights)
            except (RayError, WeightsError, TimeoutError, ValueError, OSError) as error:
                # Nothing was touched yet (a failure in the swap itself ends the process): serve on, and ask again.
                logger.warning("still on %s, could not get newer weights: %s", self._held.id, error)
                await asyncio.sleep(RETRY_S)

    async def _watch(self) -> None:
        # Serve needs three failed checks 10 s apart, and routing prefers a replica that fails fast: do not wait for it.
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self.check_health()

    async def _adopt(self, weights: Weights) -> None:
        buckets = [await self._fetched(bucket) for bucket in weights.buckets]
        async with in_thread(staged(buckets)) as update:
            del buckets
            started = time.perf_counter()
            try:
                async with asyncio.timeout(SWAP_TIMEOUT_S):
                    await self._swap(update)
                    self._held = Held(weights.id, weights.about, self._held.swaps + 1)
                    await self._client.resume_generation()
            except Exception as error:
                end_process(f"loading {weights.id} failed half-way: {error!r}")
        logger.info("now on %s, after a pause of %.0f ms", weights.id, 1000 * (time.perf_counter() - started))

    async def _swap(self, update: dict[str, Any]) -> None:
        await self._client.pause_generation(mode="keep", clear_cache=False)
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(update))
        await self._client.finish_weight_update()

    async def _fetched(self, bucket: Bucket) -> Bucket:
        here = replace(bucket, data=await asyncio.wait_for(bucket.data, FETCH_TIMEOUT_S))
        await asyncio.to_thread(verify, here)
        return here


@asynccontextmanager
async def in_thread(context: Any) -> AsyncGenerator[Any, None]:
    """Enters a blocking context manager without blocking the event loop."""
    value = await asyncio.to_thread(context.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def ended(task: asyncio.Task[None]) -> None:
    """A replica that no longer follows the store, or no longer watches its engine, must not live on."""
    if not task.cancelled():
        end_process(f"{task.get_coro()} ended: {task.exception()!r}")


def end_process(reason: str) -> NoReturn:
    """Ends this replica and its engine at once; Serve starts another, which is ready once it holds current weights."""
    logger.critical("this replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)  # Ray kills the processes that this one started


def sampling_params(
    temperature: float, top_p: float, max_tokens: int, seed: int, prompt_id: str, sample: int, end_of_turn_id: int
) -> SamplingParams:
    """vLLM's parameters for one completion, seeded by (seed, prompt id, sample)."""
    return SamplingParams(
        temperature=temperature,
        top_p=top_p if temperature > 0 else 1.0,
        max_tokens=max_tokens,
        seed=xxhash.xxh3_64_intdigest(f"{seed}/{sample}/{prompt_id}".encode()) >> 1 if temperature > 0 else None,
        stop_token_ids=[end_of_turn_id],
        logprobs=0,  # of the sampled token, and of no others
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_logprobs(output: CompletionOutput) -> list[float]:
    """Log-probability of each sampled token, nats."""
    assert isinstance(output.logprobs, FlatLogprobs)
    assert output.logprobs.token_ids == list(output.token_ids)
    return output.logprobs.logprobs


def version_chunk(previous: str, version: int) -> str:
    """A chunk of a streamed answer that only names a version; its header is that of the chunk before it."""
    header = json.loads(previous.removeprefix("data: "))
    fields = {key: header.get(key) for key in ("id", "object", "created", "model")}
    return f"data: {json.dumps({**fields, 'choices': [], 'policy_version': version})}\n\n"


def cpu_engine(max_model_len: int) -> dict[str, Any]:
    """vLLM's settings where there is no GPU: nothing to compile, and whole prompts only.

    vLLM 0.29 rewinds the random generator of a seeded request whose prompt it cuts into chunks, which on a CPU kills
    the engine ("CPU Generator does not use offset").
    """
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 4096),
    }


def policy_deployment(
    model_id: str,
    model_folder: str,
    chat_folder: str,
    store: str,
    config: GeneratorsConfig,
    max_model_len: int,
    name: str = "policy",
) -> serve.Application:
    """The Serve deployment of policy replicas.

    `model_folder` is a complete version (000000: architecture, and weights until the store's are in), `chat_folder` the
    run's tokenizer with its chat template and end-of-turn token, `store` the name of the weight store, which must run.
    `config.num_gpus` decides between GPU and CPU.
    """
    gpus = config.num_gpus or 0
    offline = Path(model_folder).is_dir()
    llm_config = LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model_folder},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"GPU": gpus} if gpus else {"CPU": 0}},
        deployment_config={"ray_actor_options": {"num_cpus": 1 if config.num_cpus is None else config.num_cpus}},
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}} if offline else None,
        engine_kwargs={
            "tokenizer": chat_folder,
            "max_model_len": max_model_len,
            "dtype": "bfloat16",
            "generation_config": "vllm",
            "enable_prompt_tokens_details": True,
            "worker_extension_cls": "sampo_ray.actors.weight_transfer.WorkerExtension",
            "weight_transfer_config": {"backend": BACKEND},
            **({} if gpus else cpu_engine(max_model_len)),
            **config.engine,
        },
    )
    options = {
        "name": name,
        "autoscaling_config": config.autoscaling,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
    }
    return build_llm_deployment(
        llm_config,
        bind_kwargs={"store": store, "chat_folder": chat_folder},
        override_serve_options=options,
        deployment_cls=PolicyServer,
    )
