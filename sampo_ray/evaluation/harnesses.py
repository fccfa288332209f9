"""Which harness plans and runs a task. Each is a package of its own, and is imported when it is used."""

from sampo_ray.data.chat import ChatFormat
from sampo_ray.evaluation.plans import Asking, Plan
from sampo_ray.evaluation.records import TaskResult
from sampo_ray.evaluation.subject import Subject
from sampo_ray.evaluation.tasks import Task


def plan(task: Task, chat: ChatFormat, context: int, asking: Asking, dtype: str | None = None) -> Plan:
    """Builds all prompts without asking anything; `context`: see `Subject`. EvaluationError where the task cannot be
    run like this."""
    if task.kind == "judged":
        from sampo_ray.evaluation import alpaca_eval

        found = alpaca_eval.plan(chat, context, asking.judged(task), dtype)
        first = chat.render(found.questions[0].messages)
        return Plan(task, len(found.questions), first, (), found.conditions, found.judge_calls)
    if task.kind == "verified":
        from sampo_ray.evaluation import ifbench

        return ifbench.plan(task, chat, context, asking, dtype)
    from sampo_ray.evaluation import harness

    return harness.plan(task, chat, context, asking, dtype)


def run(task: Task, subject: Subject, asking: Asking) -> tuple[TaskResult, bytes]:
    """The result of a task and its samples, a JSON line each. EvaluationError where there is no honest score."""
    if task.kind == "judged":
        from sampo_ray.evaluation import alpaca_eval

        return alpaca_eval.run(subject, asking.judged(task))
    if task.kind == "verified":
        from sampo_ray.evaluation import ifbench

        return ifbench.run(task, subject, asking)
    from sampo_ray.evaluation import harness

    return harness.run(task, subject, asking)
