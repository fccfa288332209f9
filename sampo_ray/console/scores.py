"""What `sampo evaluate` shows: plans, a table of scores with intervals and limits, and what is to be known of them."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from sampo_ray.evaluation.comparison import is_trial
from sampo_ray.evaluation.plans import Plan
from sampo_ray.evaluation.records import Score, TaskResult
from sampo_ray.evaluation.shown import bracketed, number
from sampo_ray.evaluation.tasks import Task

IDS_SHOWN = 24


def plan_text(plan: Plan, context: int) -> str:
    """A plan as `--dry-run` prints it: counts, conditions, and the first prompt as text and token ids."""
    about, answer = plan.conditions, plan.conditions.max_tokens
    asked = about.limit or about.total
    ids = about.first_prompt
    shown = [*map(str, ids[:IDS_SHOWN]), *(["...", *map(str, ids[-IDS_SHOWN:])] if len(ids) > 2 * IDS_SHOWN else [])]
    shown = list(map(str, ids)) if len(ids) <= 2 * IDS_SHOWN else shown
    lines = [
        f"{plan.task.name} (version {about.task_version}): {asked:,} of {about.total:,} samples, "
        f"{plan.count:,} requests",
        f"  asked through {about.route}, {about.shots}-shot ({about.shots_form})"
        + ("" if about.card_shots is None else f"; the card says {about.card_shots}-shot"),
        f"  longest prompt {about.longest_prompt:,} tokens"
        + (f", answers of up to {answer:,}" if answer else "")
        + f", context {context:,}; {about.bos} BOS in the first prompt",
        *([f"  the judge is asked up to {plan.judge_calls:,} times"] if plan.judge_calls else []),
        *([f"  stops at {', '.join(map(repr, plan.stop))}"] if plan.stop else []),
        *(f"  {note}" for note in about.notes),
        f"  first prompt, {len(ids):,} tokens: {' '.join(shown)}",
        *(f"  | {line}" for line in plan.first_text.splitlines()),
    ]
    return "\n".join([*lines, ""])


def score_table(results: Sequence[TaskResult], tasks: Iterable[Task]) -> Table:
    """A row for each version, a column for each score of the card's; shares in per cent, with 95 % intervals."""
    columns = [(task, column) for task in tasks for column in task.columns]
    table = Table("version", *(column.title for _, column in columns))
    for label in dict.fromkeys(result.label for result in results):
        of = {result.task: result for result in results if result.label == label}
        cells = [cell(of[task.name], column.of(of[task.name])) if task.name in of else "-" for task, column in columns]
        table.add_row(label, *cells)
    return table


def cell(result: TaskResult, score: Score | None) -> str:
    """`35.0 [28.1, 42.6], 20 of 1,319`: a score, its interval, and of how many samples if not of all."""
    if score is None:
        return "-"
    about = result.conditions
    limit = f", {about.limit:,} of {about.total:,}" if is_trial(about) else ""
    return f"{number(score.value, score.unit)} {bracketed(score)}".strip() + limit


def result_notes(results: Sequence[TaskResult]) -> list[str]:
    """Notes that results carry, shares of empty, cut and failed answers, and what judging took, a line each."""
    lines = dict.fromkeys(f"{result.task}: {note}" for result in results for note in result.conditions.notes)
    for result in results:
        about, asked = result.conditions, result.conditions.limit or result.conditions.total
        lost = {name: count for name, count in about.lost.items() if count}
        if lost:
            said = ", ".join(f"{count / asked:.1%} {name}" for name, count in lost.items())
            lines[f"{result.task} of {result.label}: of its answers {said}"] = None
        if about.judge is not None and about.judge.tally.asked:
            lines[f"{result.task} of {result.label}: judged with {about.judge.tally.text()}"] = None
    return list(lines)
