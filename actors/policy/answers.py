"""What a replica generates: completions on token ids for rollouts, and answers to OpenAI requests as items."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

import pyarrow as pa
from pydantic import BaseModel
from vllm import SamplingParams, TokensPrompt
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.policy import messages, sse
from sampo_ray.actors.policy.lifecycle import RequestGate, end_process
from sampo_ray.actors.policy.replica_weights import ReplicaWeights
from sampo_ray.data.chat import ChatFormat
from sampo_ray.training.streams import completion_seed

FIRST_PROGRESS_S, PROGRESS_S = 0.05, 0.5
ENDS_CHOICE = '"finish_reason":"'  # in JSON text no string holds this: quotation marks in strings are escaped


class Rollouts:
    """Draws completions from the weights that a replica holds."""

    def __init__(self, client: AsyncLLM, weights: ReplicaWeights, gate: RequestGate, chat: ChatFormat) -> None:
        self._client, self._weights, self._gate, self._chat = client, weights, gate, chat

    async def generate(self, prompts: pa.Table, rows: Sequence[int], request: messages.RolloutRequest) -> pa.Table:
        """Samples completions for each of `rows` of a PROMPTS block; returns a COMPLETIONS block in order.

        A completion's ids are those the engine sampled, with the end-of-turn token where it stopped. Log-probs are the
        model's own (nats, before temperature and top-p). Versions are those held when the request came and when it
        ended. Waits for `request.weights`; WeightsNotLoadedError if they do not come or have passed.
        """
        if request.weights is not None:
            await self._weights.wait_for(request.weights)
        chosen, end = prompts.take(list(rows)), self._chat.end_of_turn_id
        drawn = await asyncio.gather(
            *(
                self._complete(prompt, sampling_params(request, key, sample, end))
                for key, prompt in zip(chosen["id"].to_pylist(), chosen["prompt"].to_pylist(), strict=True)
                for sample in range(request.samples)
            )
        )
        outputs = [output for output, _, _ in drawn]
        ids = [list(output.token_ids) for output in outputs]
        columns = {
            "sample": pa.array(list(range(request.samples)) * len(chosen), pa.int32()),
            "completion": pa.array(ids, pa.list_(pa.int32())),
            "text": pa.array([self._chat.text(each) for each in ids], pa.string()),
            "finish_reason": pa.array([output.finish_reason for output in outputs], pa.string()),
            "logprobs": pa.array([sampled_logprobs(output) for output in outputs], pa.list_(pa.float32())),
            "first_version": pa.array([first for _, first, _ in drawn], pa.int64()),
            "last_version": pa.array([last for _, _, last in drawn], pa.int64()),
        }
        table = chosen.take([row for row in range(len(chosen)) for _ in range(request.samples)])
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    async def warm_up(self) -> None:
        """Has the engine compile what rollouts and endpoint use. Otherwise the first batches take many seconds."""
        end = self._chat.end_of_turn_id
        requests = [messages.RolloutRequest(1, temperature, 0.9, 8, seed=0) for temperature in (0.0, 1.0)]
        params = [sampling_params(request, "warm-up", n, end) for request in requests for n in range(4)]
        await asyncio.gather(*(self._complete([end] * 8, each) for each in params))

    async def _complete(self, prompt: list[int], params: SamplingParams) -> tuple[CompletionOutput, int, int]:
        """What the engine sampled, and the versions held when the request came and when it ended."""
        async with self._gate.request():
            first = self._weights.loaded
            request = TokensPrompt(prompt_token_ids=prompt, cache_salt=first.salt)
            try:
                async for output in self._client.generate(request, params, request_id=os.urandom(16).hex()):
                    final = output
            except EngineDeadError as error:
                end_process(f"the engine died: {error}")
            return final.outputs[0], first.id.version, self._weights.loaded.id.version


def sampling_params(
    request: messages.RolloutRequest, prompt_id: str, sample: int, end_of_turn_id: int
) -> SamplingParams:
    """vLLM's parameters for one completion, seeded by (request's seed, prompt id, sample)."""
    greedy = request.temperature == 0
    return SamplingParams(
        temperature=request.temperature,
        top_p=1.0 if greedy else request.top_p,
        max_tokens=request.max_tokens,
        seed=None if greedy else completion_seed(request.seed, prompt_id, sample),
        stop_token_ids=[end_of_turn_id],
        logprobs=0,  # only that of the sampled token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_logprobs(output: CompletionOutput) -> list[float]:
    """Log-probability of each sampled token, nats."""
    assert isinstance(output.logprobs, FlatLogprobs)
    assert output.logprobs.token_ids == list(output.token_ids)
    return output.logprobs.logprobs


async def answer_items(
    items: AsyncIterator[list[str] | BaseModel],
    spans: Sequence[messages.VersionSpan],
    changed: Callable[[], messages.WeightsChanged],
) -> AsyncGenerator[messages.AnswerItem, None]:
    """What LLMServer yields, as items. After a swap, `changed()` precedes each that names versions: an answer that is
    not streamed, or the chunk with which a choice ends. Chunks of their own would surprise clients: OpenAI's all have a
    choice.
    """
    async for item in items:
        swapped = len(spans) > 1
        if isinstance(item, list):
            if swapped and any(map(ends_choice, item)):
                item = [with_versions(event, spans) if ends_choice(event) else event for event in item]
                yield changed()
            for each in chunks_or_failure(item):
                yield each
        elif isinstance(item, ErrorResponse):
            yield failure(item)
        else:
            if swapped:
                item.policy_versions = list(spans)  # type: ignore[attr-defined]
                yield changed()
            yield messages.Whole(item)


def with_model_name(item: messages.AnswerItem, engine: str, users: str) -> messages.AnswerItem:
    """An item of an answer by the model that the engine calls `engine`, with the name that users know."""
    if engine == users or not isinstance(item, messages.Chunks):
        return item  # what is not streamed is named by the endpoint
    field, named = re.compile(f'"model": ?"{re.escape(engine)}"'), f'"model":"{users}"'
    # It comes before anything that a model or a user has said.
    return messages.Chunks([field.sub(named, event, count=1) for event in item.events])


def chunks_or_failure(events: list[str]) -> Iterator[messages.Chunks | messages.Failure]:
    """Events of a stream up to an error, and the error, which LLMServer yields as text or as an object among them."""
    for position, event in enumerate(events):
        if isinstance(event, ErrorResponse):
            error = event
        elif event.startswith(sse.ERROR):
            error = ErrorResponse.model_validate_json(event.removeprefix(sse.PREFIX))
        else:
            continue
        if position:
            yield messages.Chunks(events[:position])
        yield failure(error)
        return
    yield messages.Chunks(events)


def failure(response: ErrorResponse) -> messages.Failure:
    return messages.Failure(response.error.code, response.error.message, response.error.param)


async def with_progress(
    items: AsyncGenerator[messages.AnswerItem, None], tokens: Callable[[], int]
) -> AsyncGenerator[messages.AnswerItem, None]:
    """The items, and while they are awaited the tokens so far: soon at first, so that little is missed of an answer
    which nobody waits for any more, then every PROGRESS_S.
    """
    pause, coming = FIRST_PROGRESS_S, None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(items, None))
            if not (await asyncio.wait({coming}, timeout=pause))[0]:
                pause = min(2 * pause, PROGRESS_S)
                yield messages.Progress(tokens())
                continue
            item, coming = coming.result(), None
            if item is None:
                return
            yield item
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        await items.aclose()


async def with_progress_between(
    items: AsyncGenerator[messages.AnswerItem, None], tokens: Callable[[], int]
) -> AsyncGenerator[messages.AnswerItem, None]:
    """The items of a stream, and between them now and then the tokens so far: an event may have several."""
    pause, due = FIRST_PROGRESS_S, time.monotonic() + FIRST_PROGRESS_S
    async with contextlib.aclosing(items):
        async for item in items:
            yield item
            if time.monotonic() > due:
                pause = min(2 * pause, PROGRESS_S)
                due = time.monotonic() + pause
                yield messages.Progress(tokens())


def ends_choice(event: object) -> bool:
    """Whether an event of a stream is the chunk with which a choice ends."""
    return isinstance(event, str) and ENDS_CHOICE in event


def with_versions(event: str, spans: Sequence[messages.VersionSpan]) -> str:
    """A chunk of a streamed answer that names versions as well."""
    return sse.event({**json.loads(event.removeprefix(sse.PREFIX)), "policy_versions": list(spans)})
