"""`POST /feedback`: keeps answers for a while and stores users' votes on them in the run directory.

Off unless `serve.feedback.keep_hours` is set. Only chat answers that a preference pair can be made of are kept: to
plain text turns, one choice, in the ordinary prompt format. Their content is never logged.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from starlette.responses import JSONResponse, Response

from sampo_ray.actors.policy import sse
from sampo_ray.config.serving import FeedbackConfig
from sampo_ray.errors import FeedbackError
from sampo_ray.run.feedback import Answer, Journal, Judgement, make_vote, votes_journal
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.errors import ApiError, unavailable
from sampo_ray.serve.requests.json_body import read_json

logger = logging.getLogger("ray.serve")  # Serve writes it to its log files
T = TypeVar("T")
FLUSH_S = 1.0  # answers of the last second are lost if the endpoint is killed; votes are not
CLEANUP_S = 60.0
MAX_BODY_BYTES = 1 << 20
SPANS = 24  # kept answers are merged into about so many files; each is dropped as a whole


class PendingAnswer:
    """A chat answer that is being sent, put together from its chunks."""

    def __init__(self, messages: list[dict[str, str]], weights: WeightsId) -> None:
        self._messages, self._weights = messages, weights
        self._id, self._text, self._reason, self._versions = "", [""], "", [weights.version]

    def from_response(self, response: BaseModel) -> Answer | None:
        """The answer of a request that does not stream."""
        self._take(response.model_dump(), "message")
        return self._finished()

    def add_events(self, chunks: str) -> Answer | None:
        """Adds the next events of a stream; returns the answer with the last one."""
        for data in sse.data_of(chunks):
            if data == sse.DONE_DATA:
                return self._finished()
            self._take(json.loads(data), "delta")
        return None

    def _take(self, body: Mapping[str, Any], field: str) -> None:
        self._id = body.get("id") or self._id
        for choice in body.get("choices") or ():
            self._text.append((choice.get(field) or {}).get("content") or "")
            if reason := choice.get("finish_reason"):
                # With a stop reason that is text, a stop string of the request ended the answer, not the policy.
                self._reason = "stop_string" if isinstance(choice.get("stop_reason"), str) else reason
        if spans := body.get("policy_versions"):
            self._versions = [span["version"] for span in spans]

    def _finished(self) -> Answer | None:
        if not self._reason or not self._id:
            return None
        return Answer(
            id=self._id,
            messages=self._messages,
            text="".join(self._text),
            finish_reason=self._reason,
            run=self._weights.run,
            versions=tuple(self._versions),
            time=time.time(),
        )


def pending_answer(request: BaseModel, weights: WeightsId) -> PendingAnswer | None:
    """The answer to a request, still empty; None if no preference pair can be made of it."""
    if not isinstance(request, ChatCompletionRequest) or (request.n or 1) != 1 or request.tools:
        return None
    if not request.add_generation_prompt or request.continue_final_message or request.truncate_prompt_tokens:
        return None
    messages = [message for message in map(_plain_message, request.messages) if message is not None]
    roles = [message["role"] for message in messages]
    if len(messages) < len(request.messages) or roles[-1] != "user" or "system" in roles[1:]:
        return None
    return PendingAnswer(messages, weights)


def _plain_message(message: Mapping[str, object]) -> dict[str, str] | None:
    """A turn of text as role and content, its parts joined as vLLM joins them; None for any other turn."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ("system", "user", "assistant") or message.get("tool_calls"):
        return None
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {"role": role, "content": content} if isinstance(content, str) else None


class _Journals:
    """The answers and votes of one run."""

    def __init__(self, place: Place, config: FeedbackConfig) -> None:
        sizes = 3600 * config.keep_hours / SPANS, max(1, config.max_answers // SPANS), config.max_bytes // SPANS
        self.place = place
        self.answers, self.votes = Journal(place.at("feedback", "answers"), *sizes), votes_journal(place)
        self.answers.refresh()
        self.votes.refresh()
        self.refreshed = time.monotonic()


class FeedbackStore:
    """Keeps answers and stores votes in the run directory that `place` gives; ApiError while that is unknown.

    Create it in a running event loop, which fills a buffer of answers; one thread reads and writes the files.
    """

    def __init__(self, place: Callable[[], Awaitable[Place]], config: FeedbackConfig) -> None:
        self._place, self._config, self._keep_s = place, config, 3600 * config.keep_hours
        self._buffer: dict[str, bytes] = {}
        self._buffered, self._cleaned_up = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "feedback")
        self._journals: _Journals | None = None
        self._flushing = asyncio.get_running_loop().create_task(self._flush_forever()) if self.enabled else None

    @property
    def enabled(self) -> bool:
        return self._keep_s > 0

    def keep(self, answer: Answer | None) -> None:
        """Buffers an answer (None: one that broke off) without waiting; drops the oldest beyond the limits. One whose
        text cannot be written as UTF-8 is not kept."""
        if answer is None:
            return
        try:
            record = answer.model_dump_json().encode()
        except PydanticSerializationError:
            return
        self._buffered += len(record) - len(self._buffer.pop(answer.id, b""))
        self._buffer[answer.id] = record
        while len(self._buffer) > self._config.max_answers or self._buffered > self._config.max_bytes:
            self._buffered -= len(self._buffer.pop(next(iter(self._buffer))))

    async def keep_stream(self, chunks: AsyncIterator[str], pending: PendingAnswer) -> AsyncIterator[str]:
        """Passes the chunks on; keeps the answer before the last one is."""
        async for text in chunks:
            self.keep(pending.add_events(text))
            yield text

    async def store(self, judgement: Judgement) -> bool:
        """Stores a vote durably; True if it was stored already. Raises ApiError if it cannot be stored."""
        place = await self._place()
        buffered = {key: self._buffer[key] for key in judgement.ids if key in self._buffer}
        return await self._in_thread(lambda: self._store(place, judgement, buffered))

    def _store(self, place: Place, judgement: Judgement, buffered: Mapping[str, bytes]) -> bool:
        journals, config = self._open(place), self._config
        if judgement.vote_id in journals.votes:
            return True
        answers = [self._answer(journals, key, buffered) for key in judgement.ids]
        if len(journals.votes) >= config.max_votes or journals.votes.nbytes >= config.max_bytes:
            message = "this run takes no more feedback: serve.feedback.max_votes or max_bytes is reached"
            raise ApiError(507, message, code="feedback_full")
        try:
            vote = make_vote(judgement, answers, time.time())
        except FeedbackError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None
        journals.votes.append([vote.model_dump_json().encode()])
        return False

    def _answer(self, journals: _Journals, key: str, buffered: Mapping[str, bytes]) -> Answer:
        if key in buffered:
            return Answer.model_validate_json(buffered[key])
        if key not in journals.answers and time.monotonic() - journals.refreshed > FLUSH_S:
            journals.refreshed = time.monotonic()
            journals.answers.refresh()  # another endpoint of the run may have written it
        record = journals.answers.get(key)
        answer = None if record is None else Answer.model_validate_json(record)
        if answer is None or answer.time < time.time() - self._keep_s:
            message = f"response {key!r}: not kept by this endpoint, or too old; send feedback on a newer response"
            raise ApiError(404, message, code="response_not_found")
        return answer

    async def close(self) -> None:
        """Writes the buffered answers."""
        if self._flushing is not None:
            self._flushing.cancel()
            with suppress(ApiError):
                await self._flush()

    async def _flush(self) -> None:
        clean_up = time.monotonic() - self._cleaned_up >= CLEANUP_S
        if not self._buffer and not clean_up:
            return
        batch, place = dict(self._buffer), await self._place()

        def write() -> None:
            journals, now = self._open(place), time.time()
            journals.answers.append(list(batch.values()))
            journals.answers.merge(now)
            journals.answers.drop(now - self._keep_s, self._config.max_answers, self._config.max_bytes)
            if clean_up:
                journals.votes.merge(now)

        await self._in_thread(write)
        self._cleaned_up = time.monotonic() if clean_up else self._cleaned_up
        for key in batch.keys() & self._buffer.keys():
            self._buffered -= len(self._buffer.pop(key))

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self._flush()
            except ApiError:
                logger.warning("the run's feedback folder cannot be used now; answers stay in memory until it can")

    def _open(self, place: Place) -> _Journals:
        if self._journals is None or self._journals.place != place:
            self._journals = _Journals(place, self._config)
        return self._journals

    async def _in_thread(self, job: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except ApiError:
            raise
        except Exception as error:  # each file system has its own library's errors, which share no other base
            logger.error("the run's feedback folder cannot be used: %s", type(error).__name__)
            raise unavailable("feedback cannot be stored now; try again soon") from None


class FeedbackRoutes:
    """Handler of `POST /feedback` for a class with a `feedback_store`."""

    feedback_store: FeedbackStore

    async def __del__(self) -> None:  # Serve awaits it when a replica is stopped
        await self.feedback_store.close()

    async def feedback(self, request: Request) -> Response:
        if not self.feedback_store.enabled:
            message = "feedback is off on this endpoint; its operator turns it on with serve.feedback.keep_hours"
            raise ApiError(403, message, code="feedback_off")
        try:
            judgement = Judgement.model_validate(await read_json(request, MAX_BODY_BYTES))
        except ValidationError as error:
            raise errors.from_validation(error) from None
        return JSONResponse({"stored": True, "duplicate": await self.feedback_store.store(judgement)})


FEEDBACK_ROUTES = {"feedback": lambda app: app.post("/feedback")}
