"""The tasks that `sampo evaluate` knows: what they are called, which scores of theirs count, and how they are asked."""

from dataclasses import dataclass
from typing import Literal

from sampo_ray.errors import EvaluationError, suggestion
from sampo_ray.evaluation.records import Score, TaskResult, Unit

Kind = Literal["generative", "likelihood", "verified", "judged", "probe"]
"""`generative`: answers through chat, scored by lm-eval. `likelihood`: choices through completions, scored by lm-eval.
`verified`: answers through chat, checked by functions. `judged`: answers through chat, compared by a judge. `probe`:
what a run asks of itself each round."""


@dataclass(frozen=True)
class Column:
    """A column of the tables: a score as the harness calls it, with its filter or judge after a comma. A name without
    one is of the first such score (`win_rate` of `win_rate,judge`)."""

    title: str
    score: str
    unit: Unit = "share"

    def of(self, result: TaskResult) -> Score | None:
        names = [score.name for score in result.scores]
        found = next((name for name in names if name == self.score or name.partition(",")[0] == self.score), None)
        return None if found is None else result.score(found)


@dataclass(frozen=True)
class Task:
    name: str
    """Where lm-eval scores it, its name there."""
    kind: Kind
    columns: tuple[Column, ...]
    shots: int = 0
    """Asked of lm-eval. Tasks that set their own number keep it."""
    card_shots: int | None = None
    """As the card of Llama-3-8B-Instruct-Iterative-SamPO names it; None: it names none, or has no such column."""
    packages: tuple[str, ...] = ("lm_eval",)
    """Modules that it cannot be run without; all are of the extra `eval` but `ifbench`."""
    dataset: str | None = None
    """The name by which lm-eval loads its data, and their folder in a data folder."""
    parts: int = 1
    """Tasks of lm-eval that it is a group of: without one of them it has no score."""
    examples_in_task: int = 0
    """Solved examples that the task itself writes into each prompt; lm-eval calls that 0-shot."""


CARD = (
    Task("gsm8k", "generative", (Column("GSM8K", "exact_match,strict-match"),), 8, 8, dataset="openai/gsm8k"),
    Task(
        "ifeval",
        "generative",
        (Column("IFEval", "inst_level_strict_acc,none"),),
        card_shots=3,
        packages=("lm_eval", "langdetect", "immutabledict", "nltk"),
        dataset="google/IFEval",
    ),
    Task("piqa", "likelihood", (Column("PiQA", "acc,none"),), 3, 3, dataset="baber/piqa"),
    Task("mmlu", "likelihood", (Column("MMLU", "acc,none"),), 0, 0, dataset="cais/mmlu", parts=57),
    Task(
        "truthfulqa_mc1",
        "likelihood",
        (Column("TruthfulQA", "acc,none"),),
        card_shots=3,
        dataset="truthfulqa/truthful_qa",
        examples_in_task=6,
    ),
    Task(
        "alpaca_eval",
        "judged",
        (
            Column("AlpacaEval2", "win_rate"),
            Column("LC AlpacaEval2", "length_controlled_winrate"),
            Column("tokens", "tokens", "tokens"),
        ),
        packages=("alpaca_eval",),
    ),
)
"""The tasks of the card, in its order of columns."""

OTHERS = (
    Task("ifbench", "verified", (Column("IFBench", "prompt_level_loose_acc"),), packages=("ifbench",)),
    Task(
        "probe",
        "probe",
        (
            Column("win rate against base", "win_rate_base"),
            Column("win rate against the version before", "win_rate_previous"),
            Column("probe tokens", "mean_tokens", "tokens"),
            Column("reward a token", "reward_slope", "slope"),
        ),
        packages=(),
    ),
)

TASKS = {task.name: task for task in (*CARD, *OTHERS)}


def task_named(name: str) -> Task:
    """EvaluationError, with the name that may have been meant, for one that there is not."""
    if name not in TASKS:
        raise EvaluationError(f"tasks: there is no task {name!r}; {suggestion(name, TASKS)}")
    return TASKS[name]
