"""Rollouts: completions on token ids, with the log-probs of the sampled tokens and the versions that drew them."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from vllm import SamplingParams, TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sampo_ray.actors.policy.lifecycle import RequestGate
from sampo_ray.actors.policy.messages import RolloutRequest
from sampo_ray.actors.policy.process import end_process
from sampo_ray.actors.policy.replica_weights import ReplicaWeights
from sampo_ray.data.chat import ChatFormat
from sampo_ray.training.streams import completion_seed


@dataclass(frozen=True)
class Completion:
    """What the engine sampled, and the versions held when the request came and when it ended."""

    output: CompletionOutput
    first_version: int
    last_version: int


class Rollouts:
    """Draws completions from the weights that a replica holds."""

    def __init__(self, client: AsyncLLM, weights: ReplicaWeights, gate: RequestGate, chat: ChatFormat) -> None:
        self._client, self._weights, self._gate, self._chat = client, weights, gate, chat

    async def generate(self, prompts: pa.Table, rows: Sequence[int], request: RolloutRequest) -> pa.Table:
        """See `PolicyServer.generate`."""
        if request.weights is not None:
            await self._weights.wait_for(request.weights)
        chosen = prompts.take(list(rows))
        keys, ids = chosen["id"].to_pylist(), chosen["prompt"].to_pylist()
        completions = await asyncio.gather(
            *(
                self._complete(prompt, sampling_params(request, key, sample, self._chat.end_of_turn_id))
                for key, prompt in zip(keys, ids, strict=True)
                for sample in range(request.samples)
            )
        )
        repeated = chosen.take([row for row in range(len(chosen)) for _ in range(request.samples)])
        samples = pa.array(list(range(request.samples)) * len(chosen), pa.int32())
        repeated = repeated.append_column("sample", samples)
        for name, column in self._columns(completions).items():
            repeated = repeated.append_column(name, column)
        return repeated

    async def warm_up(self) -> None:
        """Has the engine compile what rollouts and endpoint use. Otherwise the first batches take many seconds."""
        prompt, end = [self._chat.end_of_turn_id] * 8, self._chat.end_of_turn_id
        requests = [RolloutRequest(1, temperature, 0.9, 8, seed=0) for temperature in (0.0, 1.0)]
        params = [sampling_params(request, "warm-up", n, end) for request in requests for n in range(4)]
        await asyncio.gather(*(self._complete(prompt, each) for each in params))

    def _columns(self, completions: Sequence[Completion]) -> dict[str, pa.Array]:
        outputs = [each.output for each in completions]
        ids = [list(output.token_ids) for output in outputs]
        return {
            "completion": pa.array(ids, pa.list_(pa.int32())),
            "text": pa.array([self._chat.text(each) for each in ids], pa.string()),
            "finish_reason": pa.array([output.finish_reason for output in outputs], pa.string()),
            "logprobs": pa.array([sampled_logprobs(output) for output in outputs], pa.list_(pa.float32())),
            "first_version": pa.array([each.first_version for each in completions], pa.int64()),
            "last_version": pa.array([each.last_version for each in completions], pa.int64()),
        }

    async def _complete(self, prompt: list[int], params: SamplingParams) -> Completion:
        async with self._gate.request():
            first = self._weights.loaded
            request = TokensPrompt(prompt_token_ids=prompt, cache_salt=first.salt)
            try:
                async for output in self._client.generate(request, params, request_id=os.urandom(16).hex()):
                    final = output
            except EngineDeadError as error:
                end_process(f"the engine died: {error}")
            return Completion(final.outputs[0], first.id.version, self._weights.loaded.id.version)


def sampling_params(request: RolloutRequest, prompt_id: str, sample: int, end_of_turn_id: int) -> SamplingParams:
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
