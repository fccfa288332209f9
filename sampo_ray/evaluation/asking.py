"""Questions to an endpoint, many at a time: answers of a chat, and log-probs of given tokens.

Nothing is cut or left out without a word: prompts go as they are, every sampling setting is named in the request, and
what the endpoint says of its prompt and version is compared with what was meant. A busy endpoint is asked again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential

from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError, described
from sampo_ray.evaluation.records import MOST_LOST
from sampo_ray.evaluation.subject import Subject, Thinking
from sampo_ray.sources.messages import Message

PATIENCE_S = 600.0
"""How long an endpoint is asked again that is busy, starts or does not answer."""
FEW = 4
"""Failures that end nothing, of however few questions."""
TOP = 20
"""Likeliest tokens that vLLM gives at once, at most."""
LOST = -9000.0
BACKOFF = wait_exponential(multiplier=0.5, max=30.0)
GREEDY: Mapping[str, float] = {
    **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}
"""Every setting of sampling that vLLM's server would else take from the model's generation_config.json."""


@dataclass(frozen=True)
class Question:
    """A conversation to answer. `stop`: strings that end the answer, and are no part of it."""

    messages: Sequence[Message]
    prompt: Sequence[int]
    """Its token ids, as `ChatFormat` makes them."""
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=lambda: GREEDY)
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    text: str
    """Without thinking."""
    raw: str = ""
    tokens: int = 0
    """Of the answer, with its thinking and the end of turn."""
    finish: str | None = None
    """`stop`, or `length` for one that was cut."""
    error: str | None = None
    """Why there is none."""


@dataclass(frozen=True)
class Scoring:
    """Token ids of which the last `count` are to be scored."""

    tokens: Sequence[int]
    count: int


@dataclass(frozen=True)
class Scored:
    logprob: float
    """Sum over the scored tokens, in nats; raw, whatever a request would sample with."""
    greedy: bool
    """Whether each of them is the likeliest in its place."""


class Busy(Exception):
    """The endpoint may answer later, in `seconds` if it says so."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Failed(Exception):
    """There is no answer to this question."""


Asked = TypeVar("Asked")
Given = TypeVar("Given")


def answers_to(subject: Subject, questions: Sequence[Question], chat: ChatFormat) -> list[Answer]:
    """Answers in the order of the questions. EvaluationError when more than MOST_LOST of them fail, when they are of
    another version than the subject's, or when the endpoint made other token ids of a prompt."""
    thinking, failures = Thinking(chat), Failures(len(questions))

    async def ask(client: "Client", question: Question) -> Answer:
        try:
            body = await client.post("chat/completions", chat_body(question, subject.model, bool(thinking)))
        except Failed as error:
            failures.add(str(error))
            return Answer("", error=str(error))
        choice, ids = body["choices"][0], body.get("prompt_token_ids")
        if ids is not None and list(ids) != list(question.prompt):
            raise EvaluationError(other_prompt(ids, question.prompt))
        raw, tokens = choice["message"].get("content") or "", choice.get("token_ids") or []
        text = thinking.after(raw, tokens)
        if thinking:  # else the endpoint has stopped there
            text = cut_at(text, question.stop)
        return Answer(text, raw, len(tokens) or body["usage"]["completion_tokens"], choice["finish_reason"])

    return run_all(subject, questions, ask)


def scores_of(subject: Subject, scorings: Sequence[Scoring]) -> list[Scored]:
    """Log-probs in the order of the scorings. EvaluationError where any of them fails: a choice without one would make
    another choice the likeliest.

    Choices of one token after the same prompt are one request, as long as they are among the likeliest tokens there.
    """

    async def ask(client: "Client", group: list[Scoring]) -> list[Scored]:
        try:
            found = await _next_token(client, group[0].tokens[:-1]) if len(group) > 1 else {}
            best = max(found, key=lambda token: found[token], default=None)
            return [
                Scored(found[token], token == best)
                if (token := each.tokens[-1]) in found
                else await _scored(client, each)
                for each in group
            ]
        except Failed as error:
            raise EvaluationError(
                f"a log-likelihood failed, and choices are not compared without it: {error}"
            ) from None

    groups: dict[object, list[int]] = {}
    for position, scoring in enumerate(scorings):
        groups.setdefault(tuple(scoring.tokens[:-1]) if scoring.count == 1 else position, []).append(position)
    given = run_all(subject, [[scorings[at] for at in group] for group in groups.values()], ask)
    scored = {
        at: each
        for group, found in zip(groups.values(), given, strict=True)
        for at, each in zip(group, found, strict=True)
    }
    return [scored[position] for position in range(len(scorings))]


async def _next_token(client: "Client", prompt: Sequence[int]) -> dict[int, float]:
    """Log-probs of the likeliest next tokens; of fewer where vLLM has lost some, as it does beside requests with
    `logprob_token_ids` in a batch: it gives -9999 in their place."""
    body = {"prompt": list(prompt), "max_tokens": 1, "logprobs": TOP, "return_tokens_as_token_ids": True, **GREEDY}
    choice = await client.score(body)
    top = choice["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): logprob for name, logprob in top.items() if logprob > LOST}


async def _scored(client: "Client", scoring: Scoring) -> Scored:
    tokens = list(scoring.tokens)
    choice = await client.score({"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, **GREEDY})
    given = choice.get("prompt_logprobs")
    if given is None or len(given) != len(tokens):
        raise EvaluationError(
            f"{client.url} gives no log-probs of prompts (prompt_logprobs), which this task needs; use an endpoint of "
            "`sampo train` or `sampo serve`, or another vLLM"
        )
    scored = [at[str(token)] for at, token in zip(given[-scoring.count :], tokens[-scoring.count :], strict=True)]
    return Scored(sum(each["logprob"] for each in scored), all(each["rank"] == 1 for each in scored))


def chat_body(question: Question, model: str, thinks: bool) -> dict[str, Any]:
    """The request for an answer. A model that thinks is not stopped: a stop string may be within its thinking."""
    body = {"model": model, "messages": list(question.messages), "max_tokens": question.max_tokens}
    stop = {} if thinks or not question.stop else {"stop": list(question.stop)}
    return {**body, **question.sampling, **stop, "seed": question.seed, "return_token_ids": True}


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    found = [position for position in (text.find(stop) for stop in stops if stop) if position >= 0]
    return text[: min(found)] if found else text


def other_prompt(theirs: Sequence[int], ours: Sequence[int]) -> str:
    first = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    return (
        f"the endpoint's prompt is not the tokenizer's: {len(theirs)} token ids instead of {len(ours)}, the first that "
        f"differs at {first}; evaluate with the tokenizer folder that the endpoint serves"
    )


class Failures:
    """Counts failed answers of `total`, and gives up when there are too many."""

    def __init__(self, total: int) -> None:
        self._most, self._total, self._count = max(FEW, int(MOST_LOST * total)), total, 0

    def add(self, reason: str) -> None:
        self._count += 1
        if self._count > self._most:
            raise EvaluationError(f"{self._count} of {self._total} answers failed, the last: {reason}")


class Client:
    """Requests of one subject, each with a time limit, asked again while the endpoint is busy."""

    def __init__(self, subject: Subject, http: httpx.AsyncClient) -> None:
        self._subject, self._http = subject, http

    @property
    def url(self) -> str:
        return self._subject.url

    async def score(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of a completion, of which no text matters."""
        named = {"model": self._subject.model, **body, "return_token_ids": True}
        choice: dict[str, Any] = (await self.post("completions", named))["choices"][0]
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise EvaluationError(other_prompt(choice["prompt_token_ids"], body["prompt"]))
        return choice

    async def post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's body. Failed when there is none; EvaluationError when no other question would fare better."""
        kinds = retry_if_exception_type((Busy, httpx.TransportError))
        retrying = AsyncRetrying(retry=kinds, wait=pause, stop=stop_after_delay(PATIENCE_S), reraise=True)
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._once(route, body)
        except Busy as error:
            raise Failed(str(error)) from None
        except httpx.TransportError as error:
            raise EvaluationError(f"{self._subject.url} does not answer any more ({described(error)})") from None
        raise AssertionError

    async def _once(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._http.post(f"{self._subject.url}/v1/{route}", json=body)
        except (httpx.ReadTimeout, httpx.PoolTimeout):
            raise Failed(f"no answer within {self._subject.timeout_s:g} s") from None
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            self._check_version(answer.headers, found)
            return found
        reason = f"{answer.status_code}: {message_of(answer)}"
        if answer.status_code in (401, 403, 404):
            raise EvaluationError(f"{self._subject.url} refuses {self._subject.model}: {reason}")
        if answer.status_code in (429, 503):
            seconds = answer.headers.get("retry-after", "")
            raise Busy(reason, float(seconds) if seconds.isdecimal() else None)
        raise Failed(reason)

    def _check_version(self, headers: httpx.Headers, body: Mapping[str, Any]) -> None:
        wanted = self._subject.version
        if wanted is None:
            return
        found = {headers.get("x-policy-version")} | {
            str(span["version"]) for span in body.get("policy_versions") or () if "version" in span
        }
        if found != {str(wanted)} or headers.get("x-policy-run") != self._subject.run:
            raise EvaluationError(
                f"{self._subject.model} was answered by version {', '.join(sorted(map(str, found)))} of run "
                f"{headers.get('x-policy-run')}, not by version {wanted} of run {self._subject.run}; pin the version"
            )


def run_all(subject: Subject, asked: Sequence[Asked], ask: Callable[[Client, Asked], Awaitable[Given]]) -> list[Given]:
    """The results of `ask` in order, with `subject.concurrency` in flight; ends with the first error."""

    async def work() -> list[Given]:
        given: dict[int, Given] = {}
        todo = iter(enumerate(asked))
        headers = {"authorization": f"Bearer {subject.key}"} if subject.key else {}
        limits = httpx.Limits(max_connections=subject.concurrency)
        # Without the environment's HTTP proxies: the endpoint is the run's own.
        async with httpx.AsyncClient(
            timeout=subject.timeout_s, headers=headers, limits=limits, trust_env=False
        ) as http:
            client = Client(subject, http)

            async def worker() -> None:
                for position, each in todo:
                    given[position] = await ask(client, each)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(subject.concurrency, len(asked))):
                    group.create_task(worker())
        return [given[position] for position in range(len(asked))]

    try:
        return asyncio.run(work())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def pause(state: RetryCallState) -> float:
    """As long as the endpoint asks for, else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.seconds if isinstance(error, Busy) else None
    return asked if asked is not None else BACKOFF(state)


def message_of(answer: httpx.Response) -> str:
    try:
        said = answer.json()["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:500]
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase or "no message"
