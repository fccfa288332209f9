"""A version behind an endpoint as lm-evaluation-harness sees a model: its extension interface, `lm_eval.api.model`.

lm-eval's own API models cut prompts that are too long on the left, send empty ones where an answer may be longer than
the context, keep four stop strings, add no BOS, and score failed answers as wrong ones. Here prompts are rendered and
tokenized by the run's `ChatFormat`, and a task whose prompts do not all fit is refused before anything is asked.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.asking import Answer, Question, Scored, Scoring, answers_to, scores_of
from sampo_ray.evaluation.prompts import Prompts
from sampo_ray.evaluation.subject import Subject, leading_bos
from sampo_ray.sources.messages import Message

DEFAULT_MAX_TOKENS = 256
"""Of an answer, where the task says nothing: lm-eval's own default."""
KNOWN = {"until", "do_sample", "temperature", "max_gen_toks", "max_tokens", "max_new_tokens"}


class Asker(Protocol):
    """Where answers come from."""

    def answers(self, questions: Sequence[Question]) -> list[Answer]: ...

    def scores(self, scorings: Sequence[Scoring]) -> list[Scored]: ...


@dataclass(frozen=True)
class EndpointAsker:
    subject: Subject
    chat: ChatFormat

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        return answers_to(self.subject, questions, self.chat)

    def scores(self, scorings: Sequence[Scoring]) -> list[Scored]:
        return scores_of(self.subject, scorings)


class Nobody:
    """Asks nothing: for plans, whose scores nobody looks at."""

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        return [Answer("") for _ in questions]

    def scores(self, scorings: Sequence[Scoring]) -> list[Scored]:
        return [Scored(0.0, False) for _ in scorings]


class EndpointModel(TemplateLM):
    """`max_tokens`: of an answer, instead of what the task says. `context`: see `Subject`."""

    def __init__(self, chat: ChatFormat, context: int, asker: Asker, seed: int, max_tokens: int | None = None) -> None:
        super().__init__()
        self.chat, self.prompts = chat, Prompts(context)
        self.given: dict[tuple[str, int], Answer] = {}
        """Answers by lm-eval's task and document."""
        self._asker, self._seed, self._max_tokens = asker, seed, max_tokens
        self.bos = leading_bos(chat)

    @property
    def eot_token_id(self) -> int:
        return self.chat.end_of_turn_id

    @property
    def prefix_token_id(self) -> int:
        return self.chat.end_of_turn_id if self.bos is None else self.bos

    @property
    def tokenizer_name(self) -> str:
        return self.chat.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation itself: the endpoint applies the template."""
        if not add_generation_prompt:
            raise EvaluationError("a task that begins the answer itself cannot be asked through chat")
        return json.dumps(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As lm-eval's `hf` backend: with the BOS that the model is used to, once."""
        ids: list[int] = self.chat.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is False or self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        questions = self._questions(requests)
        self.prompts.ask(questions, self.chat)
        answers = self._asker.answers(questions)
        for request, answer in zip(requests, answers, strict=True):
            self.given[request.task_name, request.doc_id] = answer
        return [answer.text for answer in answers]

    def _questions(self, requests: Iterable[Instance]) -> list[Question]:
        asked: list[tuple[list[Message], dict[str, Any]]] = []
        for request in requests:
            text, settings = request.args
            asked.append((json.loads(text), dict(settings)))
        prompts = self.chat.encode_prompts([self.chat.render(messages) for messages, _ in asked])
        return [
            Question(messages, prompt, self._most(settings), stops(settings), seed=self._seed)
            for (messages, settings), prompt in zip(asked, prompts, strict=True)
        ]

    def _most(self, settings: dict[str, Any]) -> int:
        if unknown := settings.keys() - KNOWN:
            raise EvaluationError(f"the task generates with {', '.join(sorted(unknown))}, which is not known here")
        if settings.get("do_sample") or settings.get("temperature"):
            raise EvaluationError("the task samples its answers, and only greedy answers are known here")
        named = next(
            (settings[key] for key in ("max_gen_toks", "max_tokens", "max_new_tokens") if key in settings), None
        )
        return int(self._max_tokens or named or DEFAULT_MAX_TOKENS)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scorings = [Scoring([*context, *choice], len(choice)) for _, context, choice in requests]
        for ((context, choice), *_), scoring in zip(requests, scorings, strict=True):
            if not 0 < scoring.count < len(scoring.tokens):
                raise EvaluationError(f"a choice has no tokens of its own after its prompt: {choice!r}")
            self.prompts.add(scoring.tokens, context + choice, 1)
        self.prompts.check_fit()
        return [(each.logprob, each.greedy) for each in self._asker.scores(scorings)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        raise EvaluationError("tasks that score whole texts (perplexity) are not known here")


def stops(settings: dict[str, Any]) -> tuple[str, ...]:
    until = settings.get("until") or []
    return (until,) if isinstance(until, str) else tuple(until)
