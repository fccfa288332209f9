"""What is about to be asked: how long prompts are, and that none has to be cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.asking import Question


@dataclass
class Prompts:
    """Lengths are in tokens. `context`: of prompt and answer together, as the endpoint has it."""

    context: int
    count: int = 0
    longest: int = 0
    misfits: int = 0
    """Prompts that leave no room for their answer."""
    max_tokens: int | None = None
    """Of an answer, at most."""
    first: tuple[int, ...] = ()
    first_text: str = ""
    stop: tuple[str, ...] = ()

    def add(self, tokens: Sequence[int], text: str, room: int) -> None:
        """`room`: tokens of the answer, at most."""
        if not self.count:
            self.first, self.first_text = tuple(tokens), text
        self.count += 1
        self.longest = max(self.longest, len(tokens))
        self.misfits += len(tokens) + room > self.context

    def ask(self, questions: Sequence[Question], chat: ChatFormat) -> None:
        """Adds what will be asked through chat. EvaluationError where the endpoint would have to cut."""
        for question in questions:
            self.add(question.prompt, "", question.max_tokens)
        if questions:
            self.first_text = chat.render(questions[0].messages)
            self.max_tokens = max(question.max_tokens for question in questions)
            self.stop = questions[0].stop
        self.check_fit()

    def check_fit(self) -> None:
        """EvaluationError where the endpoint would have to cut."""
        if not self.misfits:
            return
        answer = self.max_tokens or 1
        raise EvaluationError(
            f"{self.misfits:,} of {self.count:,} prompts do not fit: the longest has {self.longest:,} "
            f"tokens, its answer may have {answer:,}, and both together {self.context:,}; nothing is cut. Use a "
            f"context of {self.longest + answer:,} tokens (of a live endpoint: data.max_length; with --endpoint "
            "new one is started that has the model's), fewer --max-tokens, or leave the task out"
        )
