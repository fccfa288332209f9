"""`POST /feedback`: answers are kept for a while, and what users say of them is stored with them, in the run directory.

Off unless `serve.feedback.keep_hours` is set. Only chat answers are kept, of requests that a preference pair could be
made of: plain text turns, one choice, the ordinary prompt format. Nothing of them is ever logged.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ValidationError
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from starlette.responses import JSONResponse, Response

from sampo_ray.config.serve import FeedbackConfig
from sampo_ray.errors import FeedbackError
from sampo_ray.run.feedback import Answer, Judgement, Vote, vote_of, votes_journal
from sampo_ray.run.journal import Journal
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import WeightsId
from sampo_ray.serve import errors
from sampo_ray.serve.errors import ApiError, unavailable
from sampo_ray.serve.requests import bodies

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files

FLUSH_S = 1.0
"""Answers of the last second are lost if the endpoint is killed; votes never are."""
TIDY_S = 60.0
MAX_BODY_BYTES = 1 << 20
SPANS = 24
"""Into how many files, about, the kept answers go in the end; each goes as a whole."""


class Draft:
    """A chat answer on its way to the client, put together from its chunks."""

    def __init__(self, messages: list[dict[str, str]], weights: WeightsId) -> None:
        self._messages, self._weights = messages, weights
        self._id, self._text, self._reason = "", [""], ""
        self._versions = [weights.version]

    def whole(self, response: BaseModel) -> Answer | None:
        """The answer, given the one object that it is."""
        self._take(response.model_dump(), "message")
        return self._finished()

    def add(self, chunks: str) -> Answer | None:
        """Takes the next events of the stream; the answer once its last one is among them."""
        for event in chunks.split("\n\n"):
            data = event.removeprefix("data: ")
            if data == "[DONE]":
                return self._finished()
            if data:
                self._take(json.loads(data), "delta")
        return None

    def _take(self, body: Mapping[str, Any], field: str) -> None:
        self._id = body.get("id") or self._id
        for choice in body.get("choices") or ():
            self._text.append((choice.get(field) or {}).get("content") or "")
            if reason := choice.get("finish_reason"):
                # A stop string of the request ended it, not the policy.
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


def draft_of(request: BaseModel, weights: WeightsId) -> Draft | None:
    """A draft of the answer to a request; None for one that no preference pair could be made of."""
    if not isinstance(request, ChatCompletionRequest) or (request.n or 1) != 1 or request.tools:
        return None
    if not request.add_generation_prompt or request.continue_final_message or request.truncate_prompt_tokens:
        return None
    messages = [_plain(message) for message in request.messages]
    plain = [message for message in messages if message is not None]
    roles = [message["role"] for message in plain]
    if len(plain) < len(messages) or roles[-1] != "user" or "system" in roles[1:]:
        return None
    return Draft(plain, weights)


def _plain(message: Any) -> dict[str, str] | None:
    """Role and text of a turn, its parts joined as vLLM does; None if there is more to it."""
    if message.get("role") not in ("system", "user", "assistant") or message.get("tool_calls"):
        return None
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {"role": message["role"], "content": content} if isinstance(content, str) else None


class _Books:
    """The two journals of one run."""

    def __init__(self, place: Place, config: FeedbackConfig) -> None:
        sizes = 3600 * config.keep_hours / SPANS, max(1, config.max_answers // SPANS), config.max_bytes // SPANS
        self.place = place
        self.answers, self.votes = Journal(place.at("feedback", "answers"), *sizes), votes_journal(place)
        self.answers.refresh()
        self.votes.refresh()
        self.listed = time.monotonic()


class Keeper:
    """Keeps answers and stores votes in the run directory that `where` says (or an ApiError, while it is not known).
    Made in a running event loop.

    The event loop fills a buffer; files are touched by one thread, one job at a time.
    """

    def __init__(self, where: Callable[[], Awaitable[Place]], config: FeedbackConfig) -> None:
        self._where, self._config, self._keep_s = where, config, 3600 * config.keep_hours
        self._buffer: dict[str, bytes] = {}
        self._buffered = 0
        self._thread = ThreadPoolExecutor(1, "feedback")
        self._books: _Books | None = None
        self._tidied = 0.0
        self._flushing = asyncio.get_running_loop().create_task(self._flush_forever()) if self.on else None

    @property
    def on(self) -> bool:
        return self._keep_s > 0

    def keep(self, answer: Answer | None) -> None:
        """Takes an answer (None: one that broke off). Returns at once; what is too much pushes the oldest out."""
        if answer is None:
            return
        record = answer.model_dump_json().encode()
        self._buffer[answer.id] = record
        self._buffered += len(record)
        while len(self._buffer) > self._config.max_answers or self._buffered > self._config.max_bytes:
            self._buffered -= len(self._buffer.pop(next(iter(self._buffer))))

    async def passing(self, chunks: AsyncIterator[str], draft: Draft) -> AsyncIterator[str]:
        """The chunks as they are; the answer is kept just before its last one goes on."""
        async for text in chunks:
            self.keep(draft.add(text))
            yield text

    async def store(self, said: Judgement) -> bool:
        """Stores a judgement; durable when it returns. True: it was stored already. ApiError when it cannot be."""
        place = await self._where()
        held = {key: self._buffer[key] for key in said.ids if key in self._buffer}
        return await self._in_thread(lambda: self._judge(place, said, held))

    def _judge(self, place: Place, said: Judgement, held: Mapping[str, bytes]) -> bool:
        books, config = self._open(place), self._config
        if said.vote_id in books.votes:
            return True
        answers = [Answer.model_validate(self._answer(books, key, held)) for key in said.ids]
        if len(books.votes) >= config.max_votes or books.votes.nbytes >= config.max_bytes:
            raise ApiError(507, "this run takes no more feedback: it has as much as it may hold", code="feedback_full")
        try:
            vote: Vote = vote_of(said, answers, time.time())
        except FeedbackError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None
        books.votes.append([vote.model_dump_json().encode()])
        return False

    def _answer(self, books: _Books, key: str, held: Mapping[str, bytes]) -> dict[str, Any]:
        if key in held:
            return json.loads(held[key])
        if key not in books.answers and time.monotonic() - books.listed > FLUSH_S:
            books.listed = time.monotonic()
            books.answers.refresh()  # another endpoint of the run may have given it
        found = books.answers.get(key)
        if found is None or found["time"] < time.time() - self._keep_s:
            raise ApiError(404, f"response {key!r}: not kept by this endpoint, or no longer", code="response_not_found")
        return found

    async def close(self) -> None:
        """Writes what is still in the buffer, for an end in peace."""
        if self._flushing is not None:
            self._flushing.cancel()
            with suppress(ApiError):
                await self._flush()

    async def _flush(self) -> None:
        """Writes what was kept since the last time, and lets go of what is too old."""
        tidy = time.monotonic() - self._tidied >= TIDY_S
        if not self._buffer and not tidy:
            return
        batch, place = dict(self._buffer), await self._where()

        def write() -> None:
            books, now = self._open(place), time.time()
            books.answers.append(list(batch.values()))
            books.answers.merge(now)
            books.answers.drop(now - self._keep_s, self._config.max_answers, self._config.max_bytes)
            if tidy:
                books.votes.merge(now)

        await self._in_thread(write)
        self._tidied = time.monotonic() if tidy else self._tidied
        for key in batch.keys() & self._buffer.keys():
            self._buffered -= len(self._buffer.pop(key))

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self._flush()
            except ApiError:
                logger.warning("answers cannot be kept for feedback just now; they wait")

    def _open(self, place: Place) -> _Books:
        if self._books is None or self._books.place != place:
            self._books = _Books(place, self._config)
        return self._books

    async def _in_thread(self, job: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except ApiError:
            raise
        except Exception as error:  # each file system has its own library's errors, which share no other base
            logger.error("the run's feedback folder cannot be used: %s", type(error).__name__)
            raise unavailable("feedback cannot be stored just now; try again soon") from None


class FeedbackRoutes:
    """Handler of `POST /feedback`; the class that has it brings a `keeper`."""

    keeper: Keeper

    async def __del__(self) -> None:  # Serve awaits it when a replica is stopped
        await self.keeper.close()

    async def feedback(self, request: Request) -> Response:
        if not self.keeper.on:
            message = "feedback is off on this endpoint; its operator turns it on with serve.feedback.keep_hours"
            raise ApiError(403, message, code="feedback_off")
        try:
            said = Judgement.model_validate(await bodies.read_json(request, MAX_BODY_BYTES))
        except ValidationError as error:
            raise errors.from_validation(error) from None
        return JSONResponse({"stored": True, "duplicate": await self.keeper.store(said)})


FEEDBACK_ROUTES: dict[str, Any] = {"feedback": lambda app: app.post("/feedback")}
