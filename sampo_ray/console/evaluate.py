"""`sampo evaluate`: plans the tasks, finds or starts an endpoint, runs what has no result yet, and shows a table."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sampo_ray.console.options import EvaluateOptions
from sampo_ray.console.scores import plan_text, result_notes, score_table
from sampo_ray.console.session import library_output_to, quiet_libraries, ray_cluster
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.offline import check_data, check_packages, environment
from sampo_ray.evaluation.records import TaskResult, check_writable, read_result, result_place, subject_of, write_result
from sampo_ray.evaluation.targets import check_place, open_target
from sampo_ray.evaluation.tasks import Task, task_named
from sampo_ray.run.storage import Place

if TYPE_CHECKING:
    from sampo_ray.evaluation.alpaca_eval import AlpacaSettings
    from sampo_ray.evaluation.plans import Plan
    from sampo_ray.evaluation.subject import Subject
    from sampo_ray.evaluation.targets import Chosen, Target
    from sampo_ray.loop.evaluated import Endpoint
    from sampo_ray.loop.evaluation_jobs import Outcome


def evaluate(where: str, options: EvaluateOptions) -> None:
    """Evaluates the run or folder at `where`. EvaluationError, which names each task without a score, at the end."""
    tasks = [task_named(name) for name in options.task_names]
    if probes := [task.name for task in tasks if task.kind == "probe"]:
        raise EvaluationError(
            f"tasks: {probes[0]} is what a run asks of itself each round (evaluate.every); leave it out"
        )
    if not tasks:
        raise EvaluationError("tasks: none is named")
    check_place(where)
    _check_judged(tasks, options)
    check_packages(tasks)
    check_data(tasks, options.data)
    os.environ.update(environment(options.data))  # before the libraries are imported, which read it once
    quiet_libraries()
    console = Console(file=sys.stdout)
    log = Path(tempfile.gettempdir()) / f"sampo-evaluate-{os.getpid()}.log"
    with open_target(where, options.version_names, options.out) as target, library_output_to(log):
        failed = Evaluation(console, target, tasks, options).run()
    if failed:
        raise EvaluationError("; ".join(failed))


class Evaluation:
    """One call of the command, once its words are known to be sound."""

    def __init__(self, console: Console, target: "Target", tasks: Sequence[Task], options: EvaluateOptions) -> None:
        from sampo_ray.evaluation.plans import Asking
        from sampo_ray.loop.evaluated import find_live

        self._console, self._target, self._tasks, self._options = console, target, tasks, options
        alpaca = _alpaca(target, options) if "alpaca_eval" in options.task_names else None
        data = options.data and options.data.resolve()
        self._asking = Asking(options.limit, options.seed, options.max_tokens, data, alpaca)
        self._live = find_live(target, options.endpoint)
        self._context = target.served_context if self._live else target.context

    def run(self) -> list[str]:
        """Evaluates what has no result yet; returns a line for each that has none afterwards."""
        plans = self._plans()
        if self._options.dry_run:
            for plan in plans:
                self._say(plan_text(plan, self._context))
            return []
        todo = {chosen: [plan for plan in plans if not self._done(chosen, plan)] for chosen in self._target.versions}
        failed = []
        if any(todo.values()):
            check_writable(self._target.root)
            for outcome in self._outcomes(todo):
                failed += self._keep(outcome)
        if results := list(self._results()):
            self._console.print(score_table(results, self._tasks))
            for note in result_notes(results):
                self._say(note)
        return failed

    def _plans(self) -> "list[Plan]":
        """What each task asks. EvaluationError where one cannot be asked."""
        from sampo_ray.data.chat import ChatFormat
        from sampo_ray.evaluation.harnesses import plan

        chat, plans = ChatFormat.load(self._target.tokenizer, "tokenizer"), []
        for task in self._tasks:
            try:
                plans.append(plan(task, chat, self._context, self._asking, self._target.dtype))
            except EvaluationError as error:
                raise EvaluationError(f"{task.name}: {error}") from None
            if self._live:
                self._live.check(plans[-1])
        return plans

    def _place(self, chosen: "Chosen", task: str) -> Place:
        return result_place(self._target.root, subject_of(chosen.version, chosen.label), task)

    def _done(self, chosen: "Chosen", plan: "Plan") -> bool:
        """Whether there is a result of the same conditions."""
        found = read_result(self._place(chosen, plan.task.name))
        return found is not None and found.conditions.planned == plan.conditions.planned

    def _results(self) -> Iterator[TaskResult]:
        for chosen in self._target.versions:
            for task in self._tasks:
                if (found := read_result(self._place(chosen, task.name))) is not None:
                    yield found

    def _outcomes(self, todo: "dict[Chosen, list[Plan]]") -> "Iterator[Outcome]":
        """One version after the other, each behind an endpoint for the time of its tasks."""
        from sampo_ray.loop.evaluated import Endpoint, open_own

        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(ray_cluster(self._say))
            endpoint: Endpoint | None = self._live
            if endpoint is None:
                needed = max(plan.needs for plans in todo.values() for plan in plans)
                self._context = max(needed, min(self._target.served_context, self._context))
                self._say("starting an endpoint")
                endpoint = stack.enter_context(open_own(self._target, self._context, cluster, self._say))
            for chosen, plans in todo.items():
                if plans:
                    with endpoint.serving(chosen):
                        yield from self._jobs(self._subject(endpoint, chosen), plans)

    def _subject(self, endpoint: "Endpoint", chosen: "Chosen") -> "Subject":
        target, version = self._target, chosen.version or 0
        from sampo_ray.evaluation.subject import Subject

        return Subject(
            url=endpoint.url,
            model=f"policy@{version}",
            tokenizer=str(target.tokenizer),
            context=self._context,
            label=chosen.label,
            name=target.name,
            run=endpoint.run,
            version=version,
            dtype=target.dtype,
            concurrency=self._options.concurrency,
            timeout_s=endpoint.request_s + 60.0,
            key=endpoint.key,
        )

    def _jobs(self, subject: "Subject", plans: "list[Plan]") -> "Iterator[Outcome]":
        from sampo_ray.evaluation.harnesses import run
        from sampo_ray.loop.evaluation_jobs import Job, run_jobs

        for plan in plans:
            self._say(f"{subject.label}: {plan.task.name}, {plan.count:,} requests")
        jobs = [Job(plan.task.name, subject, partial(run, plan.task, subject, self._asking)) for plan in plans]
        yield from run_jobs(jobs, self._options.at_once, self._asking.data)

    def _keep(self, outcome: "Outcome") -> list[str]:
        """Writes the result of an outcome; returns why there is none."""
        name = f"{outcome.job.name} of {outcome.job.subject.label}"
        if outcome.result is None:
            self._say(f"{name}: no score")
            return [f"{name}: {outcome.error}"]
        result = outcome.result
        if self._target.run is None:
            result = result.model_copy(update={"run": None, "version": None})
        write_result(self._target.root, result, outcome.samples)
        self._say(f"{name}: done in {result.seconds:.0f} s")
        return []

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _alpaca(target: "Target", options: EvaluateOptions) -> "AlpacaSettings":
    """What alpaca_eval needs, with a judge that was tried. EvaluationError."""
    from sampo_ray.evaluation.alpaca_eval import AlpacaSettings, check
    from sampo_ray.evaluation.alpaca_judging import read_judge
    from sampo_ray.evaluation.win_rates import check_model

    assert options.judge is not None and options.alpaca_data is not None
    check_model(target.name)
    settings = AlpacaSettings(
        data=options.alpaca_data.resolve(),
        judge=read_judge(options.judge),
        llama3=options.llama3_tokenizer and options.llama3_tokenizer.resolve(),
        max_tokens=options.max_tokens,
        repeats=options.repeats,
        limit=options.limit,
        seed=options.seed,
        verdicts=target.root.at("verdicts"),
    )
    return check(settings)


def _check_judged(tasks: Sequence[Task], options: EvaluateOptions) -> None:
    """EvaluationError for a judged task without a judge or its files, and for those without such a task."""
    given = {"--judge": options.judge, "--alpaca-data": options.alpaca_data}
    judged = [task.name for task in tasks if task.kind == "judged"]
    missing = [name for name, value in given.items() if value is None]
    if judged and missing:
        raise EvaluationError(
            f"tasks: {judged[0]} needs {' and '.join(missing)} (a YAML file that says who judges, and the folder with "
            "the benchmark's official files)"
        )
    for name, value in given.items():
        if value is not None and not judged:
            raise EvaluationError(f"{name}={value}: none of the tasks is judged; add alpaca_eval, or leave it out")
        if value is not None and not value.exists():
            raise EvaluationError(f"{name}={value}: there is no such file or folder")
