"""Policy replicas: vLLM under Ray Serve, for rollouts and for the live endpoint, on weights that change under way."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow as pa
from ray.exceptions import RayError
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm import SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.policy.adapters import merging
from sampo_ray.actors.policy.lifecycle import Door, Event, State, after
from sampo_ray.actors.transfer.backend import staged
from sampo_ray.actors.transfer.receiving import Receiver
from sampo_ray.actors.weights.client import Channel, Weights, find_weight_store
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import Elsewhere, WeightsError
from sampo_ray.internals.serve_llm import EngineServer, use_local_folders
from sampo_ray.internals.vllm import has_requests, requests_in_flight
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import VersionInfo, WeightsId, adapter_folder, read_info
from sampo_ray.training.streams import completion_seed

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files

POLL_S = 30.0
RETRY_S = 2.0
FETCH_TIMEOUT_S = 300.0
SWAP_TIMEOUT_S = 120.0
REACH_TIMEOUT_S = 10.0
PREPARE_TIMEOUT_S = 600.0
PREPARE_SLICE_S = 0.025
SHARE_OF_A_CORE = 0.2
"""What the staging of new weights may take where the engine computes on the same cores."""
HEALTH_PERIOD_S = 0.2
FIRST_WEIGHTS_TIMEOUT_S = 600.0
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Held:
    """The weights that an engine computes with, and how many it has had before them."""

    id: WeightsId
    info: VersionInfo | None
    swaps: int
    sequence: int = 0

    @property
    def salt(self) -> str:
        """Keeps prefix blocks of other weights apart; `swaps` makes a return to earlier weights a new salt as well."""
        return f"{self.id}#{self.swaps}"


@dataclass(frozen=True)
class Origin:
    """Which weights answer from here on, and their place in the order in which weights went live."""

    id: WeightsId
    sequence: int


@dataclass(frozen=True)
class Source:
    """What a replica serves: a channel of the named weight store, or for good the one version that it is built from."""

    store: str = ""
    channel: Channel = "live"
    pinned: WeightsId | None = None
    swap: Literal["keep", "wait"] = "keep"
    drain_s: float = 300.0
    """With swap=wait: seconds that answers in flight may take to end."""
    adapters: str | None = None
    """The run directory, if LoRA adapters are served on the pinned version: asked for by `policy@NAME` or, one that is
    a version, `policy@N`, one is loaded when it is."""
    max_rank: int = 0
    transport: Literal["host", "ipc", "broadcast"] = "host"
    """How new weights come (actors/transfer/transport.py)."""


class PolicyServer(EngineServer):
    """A vLLM replica that follows the weight store. Ready only once it holds the store's current weights.

    Handle methods: `generate` (rollouts), `weights`, and what LLMServer brings. `chat` and `completions` tell which
    weights answered:

    * the first item they yield is an `Origin`: the weights held when the request came (before an error, too);
    * then come the items that LLMServer yields (lists of SSE strings, or one response object, or an ErrorResponse);
    * if other weights were swapped in on the way, one more `Origin` names them, and the answer has a field
      `policy_versions`: each `version` in turn and, by choice, `from_tokens` (null: the choice had ended). It is in the
      body or, streaming, in one more chunk without choices right before `data: [DONE]`.

    A swap pauses the engine, loads, and resumes; requests in flight keep their KV cache. An engine whose update failed
    half-way, or that died, ends this process, so that Serve starts another: it never serves half-loaded weights.
    """

    _receiver: Receiver | None = None

    async def __init__(self, llm_config: LLMConfig, *, source: Source, chat_folder: str) -> None:  # type: ignore[misc]
        self._source, self._state = source, State.STARTING
        chat_folder = await asyncio.to_thread(on_this_node, chat_folder)
        model_folder = await asyncio.to_thread(on_this_node, llm_config.model_loading_config.model_source)
        use_local_folders(llm_config, model_folder, chat_folder)
        self._format = ChatFormat.load(chat_folder, "tokenizer")
        self._held = Held(WeightsId("", -1), None, 0)  # nothing that a store would know
        self._had: set[WeightsId] = set()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._door = Door()
        self._adapting, self._adapters = asyncio.Lock(), set[str]()
        await super().__init__(llm_config)
        self._client = self.client
        await self._warm_up()
        self._become(Event.ENGINE_UP)
        if source.pinned is None:
            await self._client.init_weight_transfer_engine(WeightTransferInitRequest({}))
            if source.transport != "host":
                self._receiver = Receiver(self._client, source.transport, source.channel)
            await self._catch_up()
        else:
            self._become(Event.LOAD)
            self._held = Held(source.pinned, await asyncio.to_thread(read_info, model_folder), 1)
            self._become(Event.LOADED)
        work = (self._follow(), self._watch()) if source.pinned is None else (self._watch(),)
        self._tasks = [asyncio.create_task(each) for each in work]
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
            await self.hold(weights)
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

    async def hold(self, weights: tuple[str, int]) -> None:
        """Waits for weights (run, version) that are on their way. Elsewhere when they do not come, or have passed.

        Calls that wait make Serve start replicas before there is work for them.
        """
        wanted = WeightsId(*weights)
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        while self._held.id != wanted:
            newer = self._held.id.run == wanted.run and self._held.id.version > wanted.version
            if newer or wanted in self._had or time.monotonic() > deadline:
                raise Elsewhere(f"rollouts were asked for from {wanted}, but this replica holds {self._held.id}")
            await asyncio.sleep(0.01)

    async def weights(self) -> dict[str, Any]:
        """Which weights this replica holds (run, version, round, step), and its state (actors/policy/lifecycle.py)."""
        held, info = self._held.id, self._held.info
        place = {"round": info and info.round, "step": info and info.step}
        return {"run": held.run, "version": held.version, **place, "state": str(self._state)}

    async def chat(
        self, request: ChatCompletionRequest, raw_request_info: Any = None, at_least: tuple[str, int] = ("", 0)
    ) -> AsyncGenerator[Any, None]:
        """Answers with weights not older than `at_least` (run, sequence); Elsewhere when they do not come soon."""
        return self._versioned(super().chat, request, raw_request_info, at_least)

    async def completions(
        self, request: CompletionRequest, raw_request_info: Any = None, at_least: tuple[str, int] = ("", 0)
    ) -> AsyncGenerator[Any, None]:
        return self._versioned(super().completions, request, raw_request_info, at_least)

    async def check_health(self) -> None:
        try:
            await super().check_health()
        except EngineDeadError as error:
            end_process(f"the engine died: {error}")

    @property
    def _end_of_turn(self) -> int:
        return self._format.end_of_turn_id

    async def __del__(self) -> None:
        if getattr(self, "_tasks", None):
            self._become(Event.DRAIN)
            for task in self._tasks:
                task.cancel()
            if self._receiver:
                with contextlib.suppress(ValueError):  # the store has gone before
                    self._receiver.leave(find_weight_store(self._source.store))
        await super().__del__()

    async def _versioned(
        self, method: Any, request: Any, raw_request_info: Any, at_least: tuple[str, int]
    ) -> AsyncGenerator[Any, None]:
        await self._reach(*at_least)
        if request.model != self.model_id and self._source.adapters:
            await self._load_adapter(self._source.adapters, request.model)
        answered = self._answered(method, request, raw_request_info)
        async with self._door.inside(), contextlib.aclosing(answered) as items:
            async for item in items:
                yield item

    async def _answered(self, method: Any, request: Any, raw_request_info: Any) -> AsyncGenerator[Any, None]:
        first, previous = self._held_for(request.model), ""
        request.cache_salt = f"{first.salt}/{request.cache_salt or ''}"
        key = request.request_id = os.urandom(16).hex()  # a user's may not be unique, and a request may come again
        spans = self._answers[key] = [{"version": first.id.version}]
        try:
            yield Origin(first.id, first.sequence)
            async for item in await method(request, raw_request_info):
                if len(spans) > 1:
                    if isinstance(item, list) and item[-1] == DONE:
                        item.insert(-1, versions_chunk([previous, *item][-2], spans))
                        yield Origin(self._held.id, self._held.sequence)
                    elif hasattr(item, "choices"):
                        item.policy_versions = spans
                        yield Origin(self._held.id, self._held.sequence)
                previous = item[-1] if isinstance(item, list) else ""
                yield item
        finally:
            del self._answers[key]

    async def _load_adapter(self, run: str, model: str) -> None:
        """Makes the engine know the adapter that the model name `policy@NAME` means; at once if it does already."""
        async with self._adapting:
            if model in self._adapters:
                return
            folder = adapter_folder(run, model.partition("@")[2])
            path = await asyncio.to_thread(on_this_node, folder)
            await self.load_adapter(model, path)
            self._adapters.add(model)

    def _held_for(self, model: str) -> Held:
        """What answers for a model name: the weights held, or a version of adapters alone on them."""
        name = model.partition("@")[2]
        if not self._source.adapters or not name.isdecimal():
            return self._held
        return replace(self._held, id=WeightsId(self._held.id.run, int(name)))

    def _note_swap(self, version: int) -> None:
        """Notes for each answer in flight how many tokens it has from the weights that go. The engine is paused."""
        emitted = [(r.external_id, r.index, r.n, r.tokens) for r in requests_in_flight(self._client)]
        for request_id, spans in self._answers.items():
            spans.append({"version": version, "from_tokens": tokens_by_choice(request_id, emitted)})

    async def _reach(self, run: str, sequence: int) -> None:
        """Waits until this replica holds weights that went live no earlier than those a client has seen already."""
        deadline = time.monotonic() + REACH_TIMEOUT_S
        while self._held.id.run == run and self._held.sequence < sequence:
            if time.monotonic() > deadline:
                raise Elsewhere(f"this replica still holds {self._held.id}, older than what a client has seen")
            await asyncio.sleep(0.01)

    def _become(self, event: Event) -> None:
        self._state = after(self._state, event)

    async def _complete(
        self, prompt: list[int], params: SamplingParams
    ) -> tuple[CompletionOutput, WeightsId, WeightsId]:
        async with self._door.inside():
            first = self._held
            request = TokensPrompt(prompt_token_ids=prompt, cache_salt=first.salt)
            try:
                async for output in self._client.generate(request, params, request_id=os.urandom(16).hex()):
                    final = output
            except EngineDeadError as error:
                end_process(f"the engine died: {error}")
            return final.outputs[0], first.id, self._held.id

    async def _warm_up(self) -> None:
        """Makes the engine compile what rollouts and endpoint use; the first batches cost many seconds otherwise."""
        prompt = [self._end_of_turn] * 8
        both = [sampling_params(t, 0.9, 8, 0, "warm-up", n, self._end_of_turn) for t in (0.0, 1.0) for n in range(4)]
        await asyncio.gather(*(self._complete(prompt, params) for params in both))

    async def _catch_up(self) -> None:
        """Loads what it is to serve, again until there is nothing newer. WeightsError if the store never has any."""
        deadline = time.monotonic() + FIRST_WEIGHTS_TIMEOUT_S
        weights = await self._newer(POLL_S)
        while weights or self._held.id.version < 0:
            if weights:
                await self._adopt(weights)
            elif time.monotonic() > deadline:
                waited = f"{FIRST_WEIGHTS_TIMEOUT_S:.0f} s"
                raise WeightsError(
                    f"weight store {self._source.store!r} has had no weights for {waited}; publish version 0"
                )
            weights = await self._newer(0 if self._held.id.version >= 0 else POLL_S)

    async def _newer(self, timeout_s: float) -> Weights | None:
        known = (self._held.id, self._held.sequence) if self._held.id.version >= 0 else (None, None)
        store = find_weight_store(self._source.store)
        waiting = store.wait.remote(known[0], timeout_s, self._source.channel, known[1])
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
        if weights.id == self._held.id:  # only its place in the order of what went live is another
            self._held = replace(self._held, sequence=weights.sequence)
            return
        async with self._at_hand(weights) as update:
            begun = time.perf_counter()
            await self._prepare(update)
            drains = self._source.swap == "wait"
            self._become(Event.LOAD)
            try:
                async with (
                    asyncio.timeout(SWAP_TIMEOUT_S + (self._source.drain_s if drains else 0)),
                    self._door.closed() if drains else contextlib.nullcontext(),
                ):
                    paused = time.perf_counter()
                    await self._swap(update, weights)
                    resumed = time.perf_counter()
            except Exception as error:
                self._become(Event.FAIL)
                end_process(f"loading {weights.id} failed half-way: {error!r}")
            self._become(Event.LOADED)
            await self._client.collective_rpc("release_weights")
        took = 1000 * (paused - begun), 1000 * (resumed - paused)
        logger.info("now on %s: made ready in %.0f ms, then a pause of %.0f ms", weights.id, *took)

    @contextlib.asynccontextmanager
    async def _at_hand(self, weights: Weights) -> AsyncGenerator[dict[str, Any], None]:
        """Gets weights, verified, to where the engine's workers can read them; gives the HostUpdate that says where."""
        if self._receiver and weights.adapters is None:
            received = await self._receiver.receive(find_weight_store(self._source.store), weights)
            if received is not None:
                yield received
                return
        buckets = [await self._fetched(bucket) for bucket in weights.buckets]
        engine_computes = current_platform.is_cpu() and has_requests(self._client)
        share, merge = SHARE_OF_A_CORE if engine_computes else 1.0, None
        if weights.adapters is not None and weights.info.adapters is not None:
            adapters = await self._fetched(weights.adapters)
            merge = await asyncio.to_thread(merging, adapters, weights.info.adapters.scaling, share)
        async with in_thread(staged(buckets, share, merge)) as update:
            del buckets
            yield update

    async def _prepare(self, update: dict[str, Any]) -> None:
        """Has the workers do beforehand, between the steps of the engine, what can be done before the pause."""
        begin: dict[str, Any] | None = update
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            while not all(await self._client.collective_rpc("prepare_weights", args=(begin, PREPARE_SLICE_S))):
                begin = None

    async def _swap(self, update: dict[str, Any], weights: Weights) -> None:
        await self._client.pause_generation(mode="keep", clear_cache=False)
        self._note_swap(weights.id.version)
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(update))
        await self._client.finish_weight_update()
        self._had.add(self._held.id)
        self._had.discard(weights.id)
        self._held = Held(weights.id, weights.info, self._held.swaps + 1, weights.sequence)
        await self._client.resume_generation()

    async def _fetched(self, bucket: Bucket) -> Bucket:
        return replace(bucket, data=await asyncio.wait_for(bucket.data, FETCH_TIMEOUT_S))


@contextlib.asynccontextmanager
async def in_thread(context: Any) -> AsyncGenerator[Any, None]:
    """Enters a blocking context manager without blocking the event loop."""
    value = await asyncio.to_thread(context.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def on_this_node(url: str) -> str:
    """The path of a folder on this machine: its own, or that of a copy, which stays as long as the machine keeps it."""
    place = Place(url)
    if place.local:
        return place.path
    scratch = Path(tempfile.mkdtemp(prefix="sampo-"))
    with place.on_disk() as folder:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
    return str(scratch)


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
        seed=completion_seed(seed, prompt_id, sample) if temperature > 0 else None,
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


def tokens_by_choice(request_id: str, emitted: Sequence[tuple[str, int, int, int]]) -> list[int | None]:
    """Tokens that each choice of an answer has had; None for one that has ended.

    `emitted` has an engine request's external id (which holds `request_id` and, for a list of prompts, ends in `-` and
    the prompt's position), its index among the `n` of its prompt, n, and its tokens.
    """
    found: dict[int, int] = {}
    for external_id, index, n, tokens in emitted:
        if request_id in external_id:
            position = external_id.partition(request_id)[2].removeprefix("-")
            found[(int(position) if position.isdecimal() else 0) * n + index] = tokens
    return [found.get(choice) for choice in range(max(found, default=-1) + 1)]


def versions_chunk(previous: str, spans: Sequence[dict[str, Any]]) -> str:
    """A chunk of a streamed answer that only names versions; its header is that of the chunk before it."""
    header = json.loads(previous.removeprefix("data: "))
    fields = {key: header.get(key) for key in ("id", "object", "created", "model")}
    return f"data: {json.dumps({**fields, 'choices': [], 'policy_versions': list(spans)})}\n\n"
