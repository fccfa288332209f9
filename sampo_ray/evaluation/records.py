"""Results of evaluations: what was measured of a version, with all that decides the number; and where they are kept."""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sampo_ray.errors import EvaluationError
from sampo_ray.judging.tally import Tally
from sampo_ray.run.storage import Place

FOLDER, RESULT, SAMPLES = "evaluations", "result.json", "samples.jsonl"
MOST_LOST = 0.05
"""Share of answers that may have failed or be empty; with more of them a task has no score."""

Unit = Literal["share", "tokens", "characters", "reward", "slope"]
"""`share`: from 0 to 1. `slope`: reward for each further token."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(Record):
    """One number of a task, by the name that its harness gives it (`exact_match,strict-match`)."""

    name: str
    value: float
    unit: Unit = "share"
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    """The 95 % interval."""
    count: int
    """Samples that it is the mean of."""


class JudgeRecord(Record):
    """Who judged, and how that went."""

    name: str
    """Model of the endpoint, or the reward model's or function's name."""
    preset: str
    weighted: bool
    """By the log-probs of the verdict's token, instead of by the verdict."""
    mode: Literal["pairwise", "pointwise", "reward"] = "pairwise"
    """Answers were compared in both orders, rated one by one, or scored by a reward model or function."""
    seed: int = 0
    tally: Tally = Tally()
    repeats: int = 1
    repeat_spread: float | None = None
    """Standard deviation of the score over repeats, as a share."""


class Conditions(Record):
    """All that decides a number besides the weights."""

    packages: dict[str, str] = {}
    """Versions of the harness and what it uses, by package."""
    task_version: str | None = None
    shots: int = 0
    """As run."""
    card_shots: int | None = None
    """As the model card of Llama-3-8B-Instruct-Iterative-SamPO names it."""
    shots_form: Literal["none", "turns", "message", "in the task"] = "none"
    limit: int | None = None
    """Samples that were asked for, of `total`; None: all."""
    total: int
    route: Literal["chat", "completions", "folder", "files", "fleet"]
    """How answers came: by the endpoint's chat or completions, from an engine on a folder, from files, or from the
    generators of a run."""
    template: str | None = None
    """Digest of the chat template."""
    first_prompt: tuple[int, ...] = ()
    """Token ids of the first prompt as the model got it."""
    bos: int | None = None
    """Beginning-of-text tokens in it."""
    longest_prompt: int | None = None
    max_tokens: int | None = None
    """Of an answer; None for log-likelihoods."""
    sampling: dict[str, float | int | None] = {}
    """As really used, the server's defaults included."""
    dtype: str | None = None
    seed: int = 0
    empty: int = 0
    cut: int = 0
    """Answers that `max_tokens` ended."""
    failed: int = 0
    judge: JudgeRecord | None = None
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> dict[str, int]:
        return {"empty": self.empty, "cut": self.cut, "failed": self.failed}

    @property
    def planned(self) -> "Conditions":
        """What of them is known before anything is asked: by it a result is known to be one of the same evaluation."""
        judge = self.judge and self.judge.model_copy(update={"tally": Tally(), "repeat_spread": None})
        return self.model_copy(update={"empty": 0, "cut": 0, "failed": 0, "notes": (), "judge": judge})


class TaskResult(Record):
    """What one version scored in one task. `samples.jsonl` beside it has a line for each sample."""

    task: str
    run: str | None = None
    """Identity of the run; None: a folder that no run wrote."""
    version: int | None = None
    label: str
    """`base`, `round-1`, `final` or another name of the version."""
    model: str
    """Base model of the run, or the folder's name."""
    scores: tuple[Score, ...]
    conditions: Conditions
    seconds: float
    created: int

    @property
    def subject(self) -> str:
        return subject_of(self.version, self.label)

    def score(self, name: str) -> Score | None:
        return next((score for score in self.scores if score.name == name), None)


def subject_of(version: int | None, label: str = "") -> str:
    """What is evaluated, as a part of paths: the version's number, or the name of a folder."""
    return label if version is None else f"{version:06d}"


def result_place(root: Place, subject: str, task: str) -> Place:
    """Folder of a result. `root`: a run directory, or an exported folder; `subject`: see `subject_of`.
    EvaluationError for names that are no part of a path."""
    for name in (subject, task):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=-]*", name):
            raise EvaluationError(f"{name!r} cannot name a result; use letters, digits and _.,=- only")
    return root.at(FOLDER, subject, task)


def write_result(root: Place, result: TaskResult, samples: bytes) -> None:
    """Keeps a result and its samples. The result is written last: a task has one only when it is complete."""
    place = result_place(root, result.subject, result.task)
    place.at(SAMPLES).write(samples)
    place.at(RESULT).write(result.model_dump_json(indent=1).encode())


def check_writable(root: Place) -> None:
    """EvaluationError where no result could be written, which is known before hours are spent."""
    trial = root.at(FOLDER, ".trial")
    try:
        trial.write(b"")
        trial.remove()
    except OSError as error:
        raise EvaluationError(f"{root.at(FOLDER).url}: results cannot be written there ({error}); name --out") from None


def read_result(place: Place) -> TaskResult | None:
    """The result in a folder; None where there is none. EvaluationError for a file that is no result."""
    file = place.at(RESULT)
    if not file.exists():
        return None
    try:
        return TaskResult.model_validate_json(file.read())
    except ValidationError as error:
        raise EvaluationError(
            f"{file.url} is no result of an evaluation ({error.error_count()} errors, the first: "
            f"{error.errors()[0]['msg']}); remove it, and evaluate again"
        ) from None


def results_in(root: Place) -> Iterator[TaskResult]:
    """All results of a run or a folder, by version and task."""
    for subject in root.at(FOLDER).names():
        for task in root.at(FOLDER, subject).names():
            if (result := read_result(root.at(FOLDER, subject, task))) is not None:
                yield result
