"""IFBench: instructions that functions verify, of the package `ifbench`, which brings data and functions.

Pyatkin et al., "Generalizing Verifiable Instruction Following" (2025), whose number is `prompt_level_loose_acc`.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.asking import GREEDY, Answer, Question, answers_to
from sampo_ray.evaluation.offline import versions_of
from sampo_ray.evaluation.plans import Asking, Plan
from sampo_ray.evaluation.prompts import Prompts
from sampo_ray.evaluation.records import Conditions, TaskResult
from sampo_ray.evaluation.scoring import lost, score_of
from sampo_ray.evaluation.subject import Subject, bos_in, template_digest
from sampo_ray.evaluation.tasks import Task
from sampo_ray.rewards.ifeval_verifiers import seed_language_detection
from sampo_ray.sources.messages import Message

MAX_TOKENS = 1280
"""Of an answer: as IFEval's."""
METRICS = ("prompt_level_loose_acc", "prompt_level_strict_acc", "inst_level_loose_acc", "inst_level_strict_acc")


@dataclass(frozen=True)
class Row:
    key: str
    prompt: str
    instructions: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    """What each of the instructions says exactly: its verifier's arguments."""


def verify(instructions: Sequence[str], settings: Sequence[Mapping[str, Any]], prompt: str, answer: str) -> list[bool]:
    """Whether an answer follows each of the instructions, named as IFBench (or IFEval) names them. EvaluationError
    without the package, and for a name that it does not know."""
    verifiers, followed = _verifiers(), []
    for name, given in zip(instructions, settings, strict=True):
        if name not in verifiers:
            raise EvaluationError(f"ifbench: it has no verifier {name!r}; install the version that the data is of")
        verifier = verifiers[name](name)
        verifier.build_description(**{key: value for key, value in given.items() if value is not None})
        if "prompt" in (verifier.get_instruction_args() or {}):
            verifier.build_description(prompt=prompt)
        followed.append(bool(answer.strip()) and bool(verifier.check_following(answer)))
    return followed


def verify_loosely(row: Row, answer: str) -> list[bool]:
    """Whether one of the answer's forms follows each instruction: as it is, without emphasis, without its first line,
    its last, or both (the benchmark's own definition)."""
    lines = answer.split("\n")
    forms = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    each = [verify(row.instructions, row.settings, row.prompt, form) for form in _both(forms)]
    return [any(found) for found in zip(*each, strict=True)]


def plan(task: Task, chat: ChatFormat, context: int, asking: Asking, dtype: str | None = None) -> Plan:
    rows, total = _rows(asking.limit)
    questions = _questions(rows, chat, asking)
    prompts = Prompts(context)
    prompts.ask(questions, chat)
    conditions = Conditions(
        packages=versions_of(("ifbench", "nltk", "transformers", "sampo-ray")),
        limit=len(rows) if len(rows) < total else None,
        total=total,
        route="chat",
        template=template_digest(chat),
        first_prompt=prompts.first,
        bos=bos_in(prompts.first, chat),
        longest_prompt=prompts.longest,
        max_tokens=prompts.max_tokens,
        sampling={**GREEDY, "seed": asking.seed},
        dtype=dtype,
        seed=asking.seed,
    )
    return Plan(task, len(questions), prompts.first_text, prompts.stop, conditions)


def run(task: Task, subject: Subject, asking: Asking) -> tuple[TaskResult, bytes]:
    begun, chat = time.monotonic(), subject.chat()
    planned = plan(task, chat, subject.context, asking, subject.dtype)
    rows, _ = _rows(asking.limit)
    answers = answers_to(subject, _questions(rows, chat, asking), chat)
    counts = lost(answers, task.name)
    with contextlib.suppress(ImportError):
        seed_language_detection()
    scored = [_scored(row, answer) for row, answer in zip(rows, answers, strict=True)]
    scores = tuple(score_of(name, _mean(found), found) for name in METRICS if (found := [s[name] for s in scored]))
    result = subject.result(task.name, scores, planned.conditions.model_copy(update=counts), begun)
    lines = [_line(*each) for each in zip(rows, answers, scored, strict=True)]
    return result, "".join(json.dumps(line) + "\n" for line in lines).encode()


def _scored(row: Row, answer: Answer) -> dict[str, list[bool]]:
    strict, loose = verify(row.instructions, row.settings, row.prompt, answer.text), verify_loosely(row, answer.text)
    prompt = {"prompt_level_loose_acc": [all(loose)], "prompt_level_strict_acc": [all(strict)]}
    return {**prompt, "inst_level_loose_acc": loose, "inst_level_strict_acc": strict}


def _line(row: Row, answer: Answer, scored: Mapping[str, list[bool]]) -> dict[str, Any]:
    scores = {name: sum(found) / len(found) for name, found in scored.items()}
    weights = {name: len(found) for name, found in scored.items() if len(found) > 1}
    said = {"answer": answer.text, "tokens": answer.tokens, "finish": answer.finish, "error": answer.error}
    about = {"id": f"ifbench/{row.key}", "prompt": row.prompt, "target": list(row.instructions)}
    return {**about, "scores": scores, "weights": weights, **said}


def _rows(limit: int | None) -> tuple[list[Row], int]:
    """The first rows of the data, and how many there are."""
    path = Path(_package().data_path())
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    try:
        found = [
            Row(str(row["key"]), row["prompt"], tuple(row["instruction_id_list"]), tuple(row["kwargs"])) for row in rows
        ]
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"ifbench: its data are in another form ({error!r}); install another version") from None
    return found[:limit], len(found)


def _questions(rows: Sequence[Row], chat: ChatFormat, asking: Asking) -> list[Question]:
    conversations: list[list[Message]] = [[{"role": "user", "content": row.prompt}] for row in rows]
    prompts = chat.encode_prompts([chat.render(messages) for messages in conversations])
    tokens = asking.max_tokens or MAX_TOKENS
    return [
        Question(messages, prompt, tokens, seed=asking.seed)
        for messages, prompt in zip(conversations, prompts, strict=True)
    ]


def _both(forms: Sequence[str]) -> list[str]:
    return [*forms, *(form.replace("*", "") for form in forms)]


def _mean(samples: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, samples)) / sum(map(len, samples))


def _package() -> Any:
    try:
        import ifbench
    except ImportError as error:
        raise EvaluationError(f"IFBench needs the package `ifbench` ({error}); pip install ifbench") from None
    return ifbench


def _verifiers() -> Mapping[str, Any]:
    _package()
    from ifbench import instructions_registry

    found: Mapping[str, Any] = instructions_registry.INSTRUCTION_DICT
    return found
