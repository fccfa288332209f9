"""A judge as what scores answers: by comparing those to a prompt with each other, or by rating each."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sampo_ray.config.judging import JudgeConfig
from sampo_ray.data.rewards import Rewards, Samples
from sampo_ray.errors import JudgeError
from sampo_ray.judging.cache import Cache, key_of
from sampo_ray.judging.client import ChatClient, NoAnswer, Rejected, Request
from sampo_ray.judging.presets import GRADES, PRESETS, comparison_prompt, grading_prompt
from sampo_ray.judging.ranking import matches, strengths
from sampo_ray.judging.tally import Tally
from sampo_ray.judging.verdicts import NoVerdict, Reply, weights_of
from sampo_ray.sources.messages import Message

TOP = 5
"""Likeliest tokens that are asked for, the most that common endpoints give."""
WORDS = 8
"""Tokens that a verdict may take where it is not weighted: some judges put it in quotes."""
TRIAL = [Message(role="user", content="What is two plus three?")], "Five.", "I do not know."
"""What a judge is tried on."""

R = TypeVar("R")


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt."""

    prompt: Sequence[Message]
    a: str
    b: str


@dataclass(frozen=True)
class Judged:
    """Values in the order of what was judged, None without a verdict; what it took."""

    values: list[float | None]
    tally: Tally


class Judge:
    """May be used from several threads; `concurrency` calls are under way among all of them. To be closed.

    `config.weighted` must be decided: see `decided`. JudgeError where the endpoint cannot be used at all.
    """

    def __init__(self, config: JudgeConfig, cache: Cache | None = None) -> None:
        self.config, self._cache = config, cache
        limits = config.timeout_s, config.retries, config.concurrency
        self.client = ChatClient(config.url, config.key_env, *limits)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()

    def close(self) -> None:
        self._run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, samples: Samples) -> Judged:
        """A reward for each sample. Pairwise: of each answer against others to the same prompt among the samples, which
        adds up to 0 for a prompt; pointwise: a grade, 1 to 9."""
        if self.config.mode == "pointwise":
            return self.grade([*zip(samples.prompts, samples.completions, strict=True)])
        groups = _groups(samples)
        pairs = [(group, i, j) for group in groups for i, j in matches(len(group.texts))]
        found = self.compare([Comparison(g.prompt, g.texts[i], g.texts[j]) for g, i, j in pairs], both_orders=False)
        shares, rewards = iter(found.values), Rewards([None] * len(samples.completions))
        for group in groups:
            met = matches(len(group.texts))
            scores = strengths(len(group.texts), met, [next(shares) for _ in met])
            for row, text in group.rows:
                rewards[row] = scores[text]
        return Judged(rewards, found.tally)

    def compare(self, pairs: Sequence[Comparison], both_orders: bool, repeat: int = 0) -> Judged:
        """How far `a` is preferred to `b` in each pair, 0 to 1. Shown first is what the seed says, or each once: then
        the mean of both counts, and none unless both have a verdict. Repeats have answers of their own."""
        return self._run(self._all([self._compare(pair, both_orders, repeat) for pair in pairs]))

    def grade(self, answers: Sequence[tuple[Sequence[Message], str]], repeat: int = 0) -> Judged:
        """The grade of each answer to its prompt, 1 to 9; the mean over the judge's log-probs if it is weighted."""
        return self._run(self._all([self._grade(prompt, answer, repeat) for prompt, answer in answers]))

    def try_once(self, weighted: bool) -> Reply:
        """One call on made-up answers. Raises Rejected; JudgeError if there is no answer."""
        prompt, good, bad = TRIAL
        if self.config.mode == "pairwise":
            messages = comparison_prompt(self.config.preset, prompt, good, bad)
        else:
            messages = grading_prompt(self.config.preset, prompt, good)
        try:
            return self._run(self.client.ask(self._request(messages, weighted))).reply
        except NoAnswer as error:
            raise JudgeError(f"{self.config.url} does not answer ({error}); start the judge, or correct url") from None

    async def _all(self, judging: Sequence[Coroutine[Any, Any, tuple[float | None, Tally]]]) -> Judged:
        async with asyncio.TaskGroup() as group:  # the first error ends all
            tasks = [group.create_task(each) for each in judging]
        done = [task.result() for task in tasks]
        return Judged([value for value, _ in done], sum((tally for _, tally in done), Tally()))

    async def _compare(self, pair: Comparison, both: bool, repeat: int) -> tuple[float | None, Tally]:
        if pair.a == pair.b:
            return 0.5, Tally()  # nothing to ask
        orders = (True, False) if both else (_a_is_first(self.config.seed, pair),)
        asked = [self._in_order(pair, a_first, repeat) for a_first in orders]
        found = await asyncio.gather(*asked)
        tally = sum((tally for _, tally in found), Tally())
        shares = [share for share, _ in found if share is not None]
        if len(shares) < len(orders):
            return None, tally
        if both:
            flips = int((shares[0] - 0.5) * (shares[1] - 0.5) < 0)
            tally += Tally(both_orders=1, flipped=flips)
        return sum(shares) / len(shares), tally

    async def _in_order(self, pair: Comparison, a_first: bool, repeat: int) -> tuple[float | None, Tally]:
        first, second = (pair.a, pair.b) if a_first else (pair.b, pair.a)
        messages = comparison_prompt(self.config.preset, pair.prompt, first, second)
        weights, tally = await self._verdict(messages, PRESETS[self.config.preset].labels, repeat)
        if weights is None:
            return None, tally
        share = weights[0]
        wins = 0.5 if share == 0.5 else float(share > 0.5)
        return share if a_first else 1 - share, tally + Tally(compared=1, first_wins=wins)

    async def _grade(self, prompt: Sequence[Message], answer: str, repeat: int) -> tuple[float | None, Tally]:
        weights, tally = await self._verdict(grading_prompt(self.config.preset, prompt, answer), GRADES, repeat)
        grade = None if weights is None else sum(int(g) * w for g, w in zip(GRADES, weights, strict=True))
        return grade, tally

    async def _verdict(
        self, messages: list[Message], labels: Sequence[str], repeat: int
    ) -> tuple[list[float] | None, Tally]:
        """The weight of each label, or None without a verdict."""
        if (weighted := self.config.weighted) is None:
            raise ValueError("weighted is not decided; take the configuration that decided() returns")
        request = self._request(messages, weighted)
        key = key_of(self.config.url, request, repeat)
        reply = await asyncio.to_thread(self._cache.get, key) if self._cache else None
        if reply is not None:
            tally = Tally(cached=1)
        else:
            try:
                reply = (await self.client.ask(request)).reply
            except (Rejected, NoAnswer):
                return None, Tally(failed=1)
            tally = Tally(calls=1, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
            if self._cache:
                await asyncio.to_thread(self._cache.put, key, reply)
        if weighted and reply.top is None and not reply.refused:
            raise JudgeError(f"{no_logprobs(self.config)}; it gave them when it was tried")
        try:
            return weights_of(reply, labels, weighted), tally
        except NoVerdict as found:
            return None, tally + Tally(**{found.kind: 1})

    def _request(self, messages: list[Message], weighted: bool) -> Request:
        body = {"model": self.config.model, "messages": messages, "temperature": 0.0}
        if weighted:
            return {**body, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        return {**body, "max_tokens": WORDS}

    def _run(self, work: Coroutine[Any, Any, R]) -> R:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


def decided(config: JudgeConfig) -> JudgeConfig:
    """The configuration with `weighted` decided, by calling the judge: once, or twice where it rejects log-probs that
    are not needed. JudgeError if it does not answer, or gives no log-probs where they are needed."""
    with Judge(config) as judge:
        try:
            gives = judge.try_once(config.weighted is not False).top is not None
        except Rejected as error:
            if config.needs_logprobs:
                raise JudgeError(f"{no_logprobs(config)} (it said: {error})") from None
            gives = False
            _accepts(judge)
    if config.needs_logprobs and not gives:
        raise JudgeError(no_logprobs(config))
    return config.model_copy(update={"weighted": gives and config.weighted is not False})


def _accepts(judge: Judge) -> None:
    try:
        judge.try_once(False)
    except Rejected as error:
        raise JudgeError(f"the judge at {judge.config.url} rejects calls: {error}; look at judge.model") from None


def no_logprobs(config: JudgeConfig) -> str:
    return (
        f"the judge {config.model!r} at {config.url} gives no log-probs, and verdicts are to be weighted by them "
        f"(preset={config.preset}); use an endpoint that gives them, or set weighted=false"
    )


@dataclass(frozen=True)
class _Group:
    """The different answers to a prompt, and of each sample its row and which of them it has."""

    prompt: Sequence[Message]
    texts: list[str]
    rows: list[tuple[int, int]]


def _groups(samples: Samples) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for row, (prompt, text) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
        group = groups.setdefault(json.dumps(prompt, sort_keys=True), _Group(prompt, [], []))
        if text not in group.texts:
            group.texts.append(text)
        group.rows.append((row, group.texts.index(text)))
    return list(groups.values())


def _a_is_first(seed: int, pair: Comparison) -> bool:
    """By the seed and the two texts, whichever of them is called a."""
    low, high = sorted((pair.a, pair.b))
    text = json.dumps([seed, list(pair.prompt), low, high], sort_keys=True)
    low_first = hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] % 2 == 0
    return low_first == (pair.a == low)
