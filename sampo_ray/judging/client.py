"""Calls of an OpenAI-compatible chat endpoint: bounded in number and time, tried again where that can help."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

import openai
import tenacity
from openai.types.chat import ChatCompletion

from sampo_ray.errors import JudgeError
from sampo_ray.judging.verdicts import Reply

LONGEST_PAUSE_S = 60.0
"""Between two tries, also where the endpoint asks for more."""
VERSION_HEADER = "x-policy-version"
"""By which our own endpoint says which weights answered."""

Request = Mapping[str, object]
"""The body of a call: model, messages, sampling."""


class Rejected(Exception):
    """The endpoint takes no such request, and says why; another request may be taken."""


class NoAnswer(Exception):
    """No answer after all tries; the text is the last reason."""


class _Again(Exception):
    """An answer that is none, which another try may mend."""


@dataclass(frozen=True)
class Answer:
    reply: Reply
    version: str | None
    """Of our own endpoint's weights."""


class ChatClient:
    """`ask` may be awaited many times at once, all in one event loop; `concurrency` calls are under way.

    JudgeError for what no further call can pass: an unknown model, a key that is refused, or an endpoint that left
    `patience` calls in a row without an answer. No message holds the key.
    """

    def __init__(self, url: str, key_env: str | None, timeout_s: float, retries: int, concurrency: int) -> None:
        self.url, self._key, self._timeout_s, self._retries = url, api_key(key_env), timeout_s, retries
        self._at_once, self.pause_s = asyncio.Semaphore(concurrency), 0.5
        self._patience, self._unanswered = max(16, 2 * concurrency), 0
        # Without a key the client would look for one of OpenAI's in the environment, and send it anywhere.
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=self._key or "none", organization="", project="", max_retries=0, timeout=timeout_s
        )

    async def ask(self, request: Request) -> Answer:
        """Raises Rejected, NoAnswer, JudgeError."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(1 + self._retries),
            wait=self._pause,
            reraise=True,
        )
        try:
            answer: Answer = await retrying(self._once, request)
        except (openai.OpenAIError, TimeoutError, _Again) as error:
            raise self._final(error) from None
        self._unanswered = 0
        return answer

    async def close(self) -> None:
        await self._client.close()

    async def _once(self, request: Request) -> Answer:
        async with self._at_once, asyncio.timeout(self._timeout_s):  # the client's limit is for each read
            raw = await self._client.chat.completions.with_raw_response.create(**request)  # type: ignore[call-overload]
        try:
            completion = raw.parse()
            return Answer(_reply(completion), raw.headers.get(VERSION_HEADER))
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError):
            raise _Again("its answer is no chat completion") from None

    def _final(self, error: Exception) -> Exception:
        """What a call that is not tried again raises."""
        if isinstance(error, openai.APIStatusError) and not _may_pass(error):
            said = self._said(error)
            if error.status_code in (400, 413, 422):
                return Rejected(said)
            advice = {401: "look at key_env", 403: "look at key_env", 404: "look at url and model"}
            return JudgeError(f"{self.url} refuses calls: {said}; {advice.get(error.status_code, 'look at its logs')}")
        self._unanswered += 1
        said = self._said(error)
        if self._unanswered >= self._patience:
            return JudgeError(
                f"{self.url} left {self._unanswered} calls in a row without an answer (the last: {said}); start it, or "
                "raise timeout_s or retries"
            )
        return NoAnswer(said)

    def _said(self, error: Exception) -> str:
        if isinstance(error, openai.APIStatusError):
            # Texts of 401 and 403 may quote the key, others the request.
            body = error.body if isinstance(error.body, dict) else {}
            words = str(body.get("message") or "") if error.status_code not in (401, 403) else ""
            if self._key:
                words = words.replace(self._key, "...")
            return f"status {error.status_code}" + (f", {' '.join(words.split())[:200]}" if words else "")
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return f"no answer within {self._timeout_s:g} s"
        if isinstance(error, openai.APIConnectionError):
            return f"no connection ({type(error.__cause__ or error).__name__})"
        return str(error) if isinstance(error, _Again) else type(error).__name__

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error.response.headers) if isinstance(error, openai.APIStatusError) else 0.0
        grown = tenacity.wait_random_exponential(self.pause_s, max=LONGEST_PAUSE_S / 2)(state)
        return min(max(asked, grown), LONGEST_PAUSE_S)


def api_key(key_env: str | None) -> str | None:
    """JudgeError if the environment lacks the variable."""
    if key_env is None:
        return None
    if not (key := os.environ.get(key_env)):
        raise JudgeError(
            f"key_env={key_env!r}: the environment has no such variable here; set it to the judge's API key where "
            "calls are made"
        )
    return key


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        out_of_credit = isinstance(error.body, dict) and error.body.get("code") == "insufficient_quota"
        return (error.status_code in (408, 409, 425, 429) and not out_of_credit) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError | _Again)


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:  # none, or a date
        return 0.0


def _reply(completion: ChatCompletion) -> Reply:
    choice = completion.choices[0]
    tops = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
    top: dict[str, float] = {}
    for each in tops:  # the same text may be several tokens; the likeliest comes first
        top.setdefault(each.token, each.logprob)
    usage = completion.usage
    return Reply(
        text=choice.message.content or "",
        finish_reason=choice.finish_reason,
        refused=bool(choice.message.refusal),
        top=top or None,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )
