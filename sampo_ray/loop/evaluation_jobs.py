"""Tasks of an evaluation as Ray tasks: some at a time, each with a time limit, and none that stops another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from sampo_ray.errors import EvaluationError, UserError
from sampo_ray.evaluation.offline import environment
from sampo_ray.evaluation.records import TaskResult
from sampo_ray.evaluation.subject import Subject

LIMIT_S = 12 * 3600.0
"""Of a task."""
Work = Callable[[], tuple[TaskResult, bytes]]
"""Asks all that a task asks of its subject; returns the result and its samples."""


@dataclass(frozen=True)
class Job:
    """`name`: of the task; `work` runs in a process of its own, in the cluster that is connected."""

    name: str
    subject: Subject
    work: Work


@dataclass(frozen=True)
class Outcome:
    job: Job
    result: TaskResult | None = None
    samples: bytes = b""
    error: str | None = None
    """Why there is no result."""


@ray.remote(num_cpus=0.5, max_retries=0)
def _run(work: Work) -> tuple[TaskResult, bytes]:
    return work()


def run_jobs(jobs: Sequence[Job], at_once: int, data: Path | None) -> Iterator[Outcome]:
    """The outcome of each, as they end. A mistake of the program is raised, a UserError is an outcome."""
    todo, running = list(jobs), dict[ray.ObjectRef, Job]()
    env = {"env_vars": environment(data)}
    try:
        while todo or running:
            while todo and len(running) < at_once:
                job = todo.pop(0)
                running[_run.options(name=f"evaluate {job.name}", runtime_env=env).remote(job.work)] = job
            done, _ = ray.wait(list(running), timeout=LIMIT_S)
            if not done:
                names = ", ".join(job.name for job in running.values())
                raise EvaluationError(f"{names}: not done within {LIMIT_S / 3600:.0f} hours; try a --limit")
            yield _outcome(done[0], running.pop(done[0]))
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _outcome(ref: ray.ObjectRef, job: Job) -> Outcome:
    try:
        result, samples = ray.get(ref, timeout=60.0)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            return Outcome(job, error=str(error.cause))
        raise
    return Outcome(job, result, samples)
