"""Answers to OpenAI requests as items that name the weights, and which tokens each version has computed."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

from pydantic import BaseModel
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from sampo_ray.actors.policy import sse
from sampo_ray.actors.policy.messages import AnswerItem, Chunks, Failure, VersionSpan, WeightsChanged, Whole
from sampo_ray.internals.vllm import RequestProgress


class AnswersInFlight:
    """The answers that a replica is giving, by request id, and the versions that have computed them."""

    def __init__(self) -> None:
        self._spans: dict[str, list[VersionSpan]] = {}

    @contextlib.contextmanager
    def track(self, request_id: str, version: int) -> Iterator[list[VersionSpan]]:
        """Around an answer; gives its spans, to which a swap adds."""
        spans = self._spans[request_id] = [VersionSpan(version=version)]
        try:
            yield spans
        finally:
            del self._spans[request_id]

    def note_swap(self, version: int, requests: Sequence[RequestProgress]) -> None:
        """Notes for each answer how many tokens it has from the old weights. `requests`: the paused engine's."""
        for request_id, spans in self._spans.items():
            spans.append(VersionSpan(version=version, from_tokens=tokens_by_choice(request_id, requests)))


async def answer_items(
    items: AsyncIterator[list[str] | BaseModel], spans: Sequence[VersionSpan], changed: Callable[[], WeightsChanged]
) -> AsyncGenerator[AnswerItem, None]:
    """What LLMServer yields, as items. If weights were swapped on the way (more than one of `spans`), the last one
    names all versions, and `changed()` comes before it.
    """
    last_event = ""
    async for item in items:
        swapped = len(spans) > 1
        if isinstance(item, list):
            if swapped and item[-1] == sse.DONE:
                item.insert(-1, versions_event([last_event, *item][-2], spans))
                yield changed()
            last_event = item[-1]
            for each in chunks_or_failure(item):
                yield each
        elif isinstance(item, ErrorResponse):
            yield failure(item)
        else:
            if swapped:
                item.policy_versions = list(spans)  # type: ignore[attr-defined]
                yield changed()
            yield Whole(item)


def chunks_or_failure(events: list[str]) -> Iterator[Chunks | Failure]:
    """Events of a stream up to an error, and the error, which LLMServer yields as text or as an object among them."""
    for position, event in enumerate(events):
        if isinstance(event, ErrorResponse):
            error = event
        elif data := sse.error_data(event):
            error = ErrorResponse.model_validate_json(data)
        else:
            continue
        if position:
            yield Chunks(events[:position])
        yield failure(error)
        return
    yield Chunks(events)


def failure(response: ErrorResponse) -> Failure:
    return Failure(response.error.code, response.error.message, response.error.param)


def tokens_by_choice(request_id: str, requests: Sequence[RequestProgress]) -> list[int | None]:
    """Tokens that each choice of an answer has; None for one that has ended."""
    found: dict[int, int] = {}
    for request in requests:
        if request_id in request.external_id:
            prompt = request.external_id.partition(request_id)[2].removeprefix("-")
            found[(int(prompt) if prompt.isdecimal() else 0) * request.n + request.index] = request.tokens
    return [found.get(choice) for choice in range(max(found, default=-1) + 1)]


def versions_event(previous: str, spans: Sequence[VersionSpan]) -> str:
    """A chunk of a streamed answer that only names versions; its other fields are those of the chunk before it."""
    header = json.loads(previous.removeprefix(sse.PREFIX))
    fields = {key: header.get(key) for key in ("id", "object", "created", "model")}
    return sse.event({**fields, "choices": [], "policy_versions": list(spans)})
