"""`sampo evaluate`'s way to ask a live endpoint, against lm-evaluation-harness's own `hf` backend (and `vllm`, with
--vllm) in this process: same tasks, samples and weights, by turns. Samples are compared one by one.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import _measure
import _rig
from _measure import Target

TARGETS = {
    name: target
    for task in ("gsm8k", "truthfulqa_mc1")
    for name, target in (
        (f"samples_per_s_vs_fastest/{task}", Target(at_least=0.9)),
        (f"equal_scores/{task}", Target(at_least=0.95)),
    )
}
CONTEXT = 2560
"""Of GSM8K's eight shots and an answer."""


def main() -> None:
    parser = _measure.options(__doc__.splitlines()[0], requests=0, repeats=2)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm-eval's data sets")
    parser.add_argument("--limit", type=int, default=32, help="samples of each task")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's own backends")
    parser.add_argument("--vllm", action="store_true", help="measure lm-eval's `vllm` backend too")
    args = parser.parse_args()
    assert args.model, "name a chat model with --model: it needs a context for GSM8K"
    _rig.quiet()
    with _rig.scratch() as folder, fleet(args, folder) as ask:
        sides = {"fleet": ask, "hf": own_backend(args, "hf")}
        if args.vllm:
            sides["vllm"] = own_backend(args, "vllm")
        for task in ("gsm8k", "truthfulqa_mc1"):
            compare(task, sides, args)


def compare(task: str, sides: Mapping[str, Callable[[str], "Turn"]], args: argparse.Namespace) -> None:
    turns = _measure.take_turns({name: lambda turn, s=side: s(task) for name, side in sides.items()}, args.repeats)
    others = [name for name in sides if name != "fleet"]
    ratios = {f"samples_per_s_vs_fastest/{task}": [], f"equal_scores/{task}": []}
    for position, ours in enumerate(turns["fleet"]):
        fastest = min((turns[name][position] for name in others), key=lambda turn: turn.seconds)
        hf = turns["hf"][position]
        ratios[f"samples_per_s_vs_fastest/{task}"].append(fastest.seconds / ours.seconds)
        equal = sum(ours.scores[sample] == hf.scores[sample] for sample in hf.scores)
        ratios[f"equal_scores/{task}"].append(equal / len(hf.scores))
    rows = [
        (
            f"{name}: samples/s",
            _measure.spread([len(turn.scores) / turn.seconds for turn in found], 2),
            str(args.repeats),
        )
        for name, found in turns.items()
    ]
    ours, hf = turns["fleet"][0], turns["hf"][0]
    same = sum(ours.said[sample] == hf.said[sample] for sample in hf.said)
    rows.append(("same answer, or same likeliest choice, as hf", f"{same} of {len(hf.said)}", "1"))
    rows += [(f"{name}: score", f"{turn[0].score:.4f}", "1") for name, turn in turns.items()]
    _measure.show(f"{task}, {args.limit} samples", ("what", "value", "turns"), rows)
    _measure.report(f"evaluation/{task}", ratios, TARGETS)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A task once: seconds without loading, and of each sample its score and what was said: the answer, or the position
    of the likeliest choice."""

    seconds: float
    score: float
    scores: dict[str, float]
    said: dict[str, object]


def turn_of(task: str, results: Mapping[str, Any], seconds: float) -> Turn:
    metric, chosen = ("exact_match", "strict-match") if task == "gsm8k" else ("acc", "none")
    samples = [each for each in results["samples"][task] if each["filter"] == chosen]

    def said(sample: Mapping[str, Any]) -> object:
        if task == "gsm8k":
            return sample["resps"][0][0].strip()
        logprobs = [each[0][0] for each in sample["resps"]]
        return logprobs.index(max(logprobs))

    scores = {str(each["doc_id"]): float(each[metric]) for each in samples}
    return Turn(
        seconds, results["results"][task][f"{metric},{chosen}"], scores, {str(e["doc_id"]): said(e) for e in samples}
    )


@contextlib.contextmanager
def fleet(args: argparse.Namespace, folder: Path) -> Iterator[Callable[[str], Turn]]:
    """A live endpoint of the model, as `sampo evaluate FOLDER` starts it, and how a task is asked of it."""
    import os

    from sampo_ray.console.session import ray_cluster
    from sampo_ray.evaluation.offline import environment

    os.environ.update(environment(args.data))
    from sampo_ray.evaluation.harness import official
    from sampo_ray.evaluation.model import EndpointAsker, EndpointModel
    from sampo_ray.evaluation.subject import Subject
    from sampo_ray.evaluation.targets import open_target
    from sampo_ray.evaluation.tasks import task_named
    from sampo_ray.loop.evaluated import open_own

    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open_target(str(args.model), [], str(folder)))
        cluster = stack.enter_context(ray_cluster(_measure.note))
        own = stack.enter_context(open_own(target, CONTEXT, cluster, _measure.note))
        at = {"url": own.url, "model": "policy@0", "tokenizer": str(target.tokenizer), "context": CONTEXT}
        subject = Subject(**at, label="bench", name=target.name, run=own.run, version=0)
        chat = subject.chat()

        def ask(task: str) -> Turn:
            asking = asking_of(args)
            model = EndpointModel(chat, CONTEXT, EndpointAsker(subject, chat), asking.seed, args.max_tokens)
            begun = time.perf_counter()
            return turn_of(task, official(task_named(task), model, asking), time.perf_counter() - begun)

        yield ask


def own_backend(args: argparse.Namespace, name: str) -> Callable[[str], Turn]:
    """One of lm-eval's models in this process, loaded once, with the engine's data type."""
    from lm_eval.api.registry import get_model

    from sampo_ray.evaluation.harness import official
    from sampo_ray.evaluation.tasks import task_named
    from sampo_ray.internals.torch import cpu_has_bf16

    dtype = "bfloat16" if cpu_has_bf16() else "float32"
    options: dict[str, Any] = {"pretrained": str(args.model), "dtype": dtype, "batch_size": args.batch_size}
    options |= (
        {"device": "cpu"} if name == "hf" else {"enforce_eager": True, "max_model_len": CONTEXT, "batch_size": "auto"}
    )
    options |= {"max_gen_toks": args.max_tokens} if name == "vllm" else {}
    model = get_model(name)(**options)
    if name == "hf":
        type(model).max_gen_toks = args.max_tokens  # a property, which only tasks' own settings would override

    def ask(task: str) -> Turn:
        begun = time.perf_counter()
        return turn_of(task, official(task_named(task), model, asking_of(args)), time.perf_counter() - begun)

    return ask


def asking_of(args: argparse.Namespace) -> Any:
    from sampo_ray.evaluation.plans import Asking

    return Asking(limit=args.limit, data=args.data.resolve(), max_tokens=args.max_tokens)


if __name__ == "__main__":
    main()
