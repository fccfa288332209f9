"""The official tasks of lm-evaluation-harness, planned and run."""

import functools
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError, first_line
from sampo_ray.evaluation.asking import GREEDY, Answer
from sampo_ray.evaluation.model import EndpointAsker, EndpointModel, Nobody
from sampo_ray.evaluation.offline import at_data, versions_of
from sampo_ray.evaluation.plans import Asking, Plan
from sampo_ray.evaluation.records import Conditions, Score, TaskResult
from sampo_ray.evaluation.scoring import lost, score_of
from sampo_ray.evaluation.subject import Subject, Thinking, bos_in, template_digest
from sampo_ray.evaluation.tasks import Task
from sampo_ray.rewards.ifeval_verifiers import seed_language_detection

PACKAGES = ("lm_eval", "datasets", "transformers", "nltk", "langdetect", "sampo-ray")


def plan(task: Task, chat: ChatFormat, context: int, asking: Asking, dtype: str | None = None) -> Plan:
    """Builds all prompts without asking anything. EvaluationError where the task cannot be run like this."""
    model = EndpointModel(chat, context, Nobody(), asking.seed, asking.max_tokens)
    results = _run(task, model, asking)
    prompts = model.prompts
    return Plan(task, prompts.count, prompts.first_text, prompts.stop, _conditions(task, model, results, asking, dtype))


def run(task: Task, subject: Subject, asking: Asking) -> tuple[TaskResult, bytes]:
    """The result of a task and its samples, a JSON line each. EvaluationError where there is no honest score."""
    begun, chat = time.monotonic(), subject.chat()
    model = EndpointModel(chat, subject.context, EndpointAsker(subject, chat), asking.seed, asking.max_tokens)
    results = _run(task, model, asking)
    conditions = _conditions(task, model, results, asking, subject.dtype)
    conditions = conditions.model_copy(update=lost(list(model.given.values()), task.name))
    samples = list(_samples(results, model.given))
    result = subject.result(task.name, tuple(_scores(task, results)), conditions, begun)
    return result, "".join(json.dumps(each, default=str) + "\n" for each in samples).encode()


@functools.cache
def _manager() -> TaskManager:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _run(task: Task, model: EndpointModel, asking: Asking) -> Mapping[str, Any]:
    if task.kind == "likelihood" and Thinking(model.chat):
        raise EvaluationError(
            f"{task.name} compares log-likelihoods of answers without thinking, and the chat template is of a model "
            "that thinks first; leave the task out"
        )
    return official(task, model, asking)


def official(task: Task, model: LM, asking: Asking) -> Mapping[str, Any]:
    """lm-eval's results with its samples, of any of its models."""
    chat = task.kind == "generative"
    if "langdetect" in task.packages:
        seed_language_detection()
    manager = _manager()
    with at_data(asking.data):
        try:
            loaded = manager.load([task.name])
        except (OSError, ValueError, LookupError) as error:
            raise EvaluationError(
                f"data: task {task.name} cannot read {task.dataset} ({first_line(error)}); nothing is downloaded: name "
                f"a folder that holds {task.dataset} with --data"
            ) from None
        for leaf in loaded["tasks"].values():
            if leaf.get_config("num_fewshot") != 0:  # a task with 0 keeps it
                leaf.set_config(key="num_fewshot", value=task.shots)
            leaf.set_fewshot_seed(seed=asking.seed)
        random.seed(asking.seed)
        np.random.seed(asking.seed % 2**32)
        options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "bootstrap_iters": 0}
        found: Mapping[str, Any] = evaluate(lm=model, task_dict=loaded, limit=asking.limit, **options)
    if len(found["samples"]) != task.parts:
        raise EvaluationError(f"{task.name} has no score: {len(found['samples'])} of its {task.parts} parts were run")
    return found


def _conditions(
    task: Task, model: EndpointModel, results: Mapping[str, Any], asking: Asking, dtype: str | None
) -> Conditions:
    prompts, chat = model.prompts, task.kind == "generative"
    samples = results["n-samples"].values()
    total, asked = sum(each["original"] for each in samples), sum(each["effective"] for each in samples)
    shots = {results["n-shot"][leaf] for leaf in results["samples"]}
    if len(shots) != 1:
        raise EvaluationError(f"{task.name} has no score: its parts have different numbers of shots, {sorted(shots)}")
    (count,) = shots
    notes = [f"{asking.limit} samples of each of its {task.parts} parts"] if task.parts > 1 and asked < total else []
    if task.examples_in_task:
        notes.append(f"the task itself writes {task.examples_in_task} solved examples into each prompt")
    if task.card_shots is not None and task.card_shots != count:
        notes.append(f"run {count}-shot, which the card calls {task.card_shots}-shot: the task sets its own number")
    form = "in the task" if task.examples_in_task else "none" if not count else "turns" if chat else "message"
    return Conditions(
        packages=versions_of(PACKAGES),
        task_version=str(results["versions"][task.name]),
        shots=count,
        card_shots=task.card_shots,
        shots_form=form,
        limit=asked if asked < total else None,
        total=total,
        route="chat" if chat else "completions",
        template=template_digest(model.chat) if chat else None,
        first_prompt=prompts.first,
        bos=bos_in(prompts.first, model.chat),
        longest_prompt=prompts.longest,
        max_tokens=prompts.max_tokens,
        sampling={**GREEDY, "seed": asking.seed} if chat else {},
        dtype=dtype,
        seed=asking.seed,
        notes=tuple(notes),
    )


def _scores(task: Task, results: Mapping[str, Any]) -> Iterator[Score]:
    """Every metric of the task, with intervals from its samples; a group's are those of its parts' samples together."""
    values = results["groups"][task.name] if task.parts > 1 else results["results"][task.name]
    for name, value in values.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        samples = [each for leaf in results["samples"].values() for each in leaf if each["filter"] == chosen]
        yield score_of(name, float(value), [each[metric] for each in samples if metric in each])


def _samples(results: Mapping[str, Any], answers: Mapping[tuple[str, int], Answer]) -> Iterator[dict[str, Any]]:
    """A line for each document: its prompt, answer and scores. The score of a sample with several parts is their mean,
    and `weights` says how many they are."""
    for leaf, samples in results["samples"].items():
        by_document: dict[int, list[Mapping[str, Any]]] = {}
        for sample in samples:
            by_document.setdefault(sample["doc_id"], []).append(sample)
        for document, found in by_document.items():
            yield _line(leaf, document, found, answers.get((leaf, document)))


def _line(leaf: str, document: int, found: Sequence[Mapping[str, Any]], answer: Answer | None) -> dict[str, Any]:
    scores, weights = dict[str, float](), dict[str, int]()
    for each in found:
        for metric in each["metrics"]:
            parts = each[metric] if isinstance(each[metric], list | tuple) else [each[metric]]
            name = f"{metric},{each['filter']}"
            scores[name] = sum(map(float, parts)) / len(parts)
            if len(parts) > 1:
                weights[name] = len(parts)
    first = found[0]
    line = {"id": f"{leaf}/{document}", "hash": first["doc_hash"], "scores": scores, "target": first["target"]}
    line |= {"weights": weights} if weights else {}
    if answer is None:
        context = first["arguments"][0][0]
        choices = [
            {"text": each[1], "logprob": got[0][0]}
            for each, got in zip(first["arguments"], first["resps"], strict=True)
        ]
        return {**line, "prompt": context, "choices": choices}
    said = {"answer": answer.text, "tokens": answer.tokens, "finish": answer.finish, "error": answer.error}
    thought = {"raw": answer.raw} if answer.raw != answer.text else {}
    return {**line, "prompt": json.loads(first["arguments"][0][0]), **said, **thought}
