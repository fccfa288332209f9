"""The manifest: which stages, rounds and checkpoints of a run are finished; and the metrics of its steps."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from sampo_ray.config.run import RunConfig
from sampo_ray.data.length_fit import LengthFit
from sampo_ray.errors import DataError
from sampo_ray.judging.tally import Tally
from sampo_ray.run.lines import records
from sampo_ray.run.storage import Place
from sampo_ray.training.statistics import Statistics


class Checkpoint(BaseModel):
    """A complete trainer state: after `step` optimizer steps of `round`, for `world` ranks."""

    path: str
    round: int
    step: int
    world: int
    files: dict[str, str]  # checksums by file name
    statistics: Statistics = Statistics()  # of the round's steps so far, for losses that use them


class Age(BaseModel):
    """How many optimizer steps older than its start the weights were that a round's completions were begun with."""

    mean: float
    most: int


class StageRecord(BaseModel):
    """A finished stage. Only the fields that were set are written."""

    rows: list[int] = []  # of each of its parts
    steps: int = 0
    seconds: float | None = None
    age: Age | None = None
    rows_read: int = 0
    dropped: dict[str, int] = {}  # rows of a source, or prompts, that were left out, by reason
    prompts_cut: int = 0
    questions_cut: int = 0  # of those, prompts whose last question lost its beginning; the others lost earlier turns
    responses_cut: int = 0
    judge: Tally | None = None  # what the rewards of a judge took
    length_fit: LengthFit | None = None  # by which rewards were corrected
    votes: int = 0  # how many the pairs come from
    left: dict[str, int] = {}  # votes that made no pair, by reason
    collapsed: str | None = None  # why the version that a round ended with counts as collapsed
    fell_back: bool = False  # the run ended therefore with the version that the round started from

    @model_serializer(mode="wrap")
    def _only_set(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


class DataRecord(StageRecord):
    """The tokenized data of a run; without a fingerprint until there is any."""

    source: str | list[str] = ""  # text: of a run that knew but one
    fingerprint: str | None = None
    used: dict[str, int] = {}  # rows of each source, where there are several
    probe: list[int] = []  # rows of each part of the prompts that versions are evaluated with
    probe_dropped: dict[str, int] = {}  # of them left out, by reason
    rest: list[int] | None = None  # rows of each part of the data without them; None: they come from elsewhere


class RoundRecord(BaseModel):
    """What the manifest knows of a round; `stages` holds the finished ones by name."""

    index: int
    start_version: int
    steps: int | None = None
    stages: dict[str, StageRecord] = {}
    committed: bool = False

    @property
    def end_version(self) -> int:
        """The version that the round ends with, once its number of steps is known."""
        return self.start_version + (self.steps or 0)

    @property
    def figures(self) -> dict[str, float]:
        """Of its rewards, by the names that they have among the metrics of its steps."""
        stages = self.stages.values()
        judge = next((stage.judge for stage in stages if stage.judge), None)
        fit = next((stage.length_fit for stage in stages if stage.length_fit), None)
        figures = {} if judge is None else judge.figures
        return figures if fit is None else {**figures, **fit.figures}

    @property
    def probed(self) -> StageRecord | None:
        """What the evaluation at the end of the round found, once it is made."""
        return self.stages.get("probe")

    @property
    def fell_back(self) -> bool:
        return self.probed is not None and self.probed.fell_back


class Manifest(BaseModel):
    format: int = 1
    id: str
    packages: dict[str, str | None] = {}
    data: DataRecord = DataRecord()
    rounds: list[RoundRecord] = []
    checkpoint: Checkpoint | None = None
    earlier: Checkpoint | None = None  # the one before, used if that is damaged
    finished: bool = False

    @property
    def given_up(self) -> int | None:
        """The version that the last round ended with, if the run ended with the one before instead."""
        return self.rounds[-1].end_version if self.rounds and self.rounds[-1].fell_back else None


@dataclass(frozen=True)
class Lineage:
    """Where a run's versions come from: base model, method, a hash of what decides the result, the data."""

    base: str
    method: str
    recipe: str
    data: str | None


def lineage(config: RunConfig, fingerprint: str | None) -> Lineage:
    method, sections = config.method, {"model", "data", "rounds", "method", "optim", "rollout", "reward"}
    decisive = {**config.model_dump(mode="json", include=sections), "run": config.run.seed}
    if config.evaluates and not config.evaluate.prompts:
        decisive["held out"] = config.evaluate.count
    return Lineage(
        base=config.model.path.rstrip("/").rsplit("/", 1)[-1],
        method=f"{method.loss}/{method.reduction}, beta {method.beta:g}",
        recipe=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12],
        data=fingerprint,
    )


def read_manifest(place: Place) -> Manifest:
    return Manifest.model_validate_json(place.at("manifest.json").read())


Values = Mapping[str, float | str | None]
"""Metrics by name: numbers, and the reason of a step that was skipped."""


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl: the metrics of step `step` (from 1) of `round` (from 0), which made `version`."""

    round: int
    step: int
    version: int
    values: Values

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics that can be drawn."""
        return {name: value for name, value in self.values.items() if isinstance(value, float)}

    def line(self) -> str:
        return json.dumps({**self.values, "round": self.round, "step": self.step, "version": self.version})


@dataclass(frozen=True)
class Stored:
    """What has become durable beside the training, and what went wrong with that without hindering it."""

    published: tuple[int, ...] = ()
    """Versions."""
    checkpoints: tuple[Checkpoint, ...] = ()
    troubles: tuple[str, ...] = ()
    overtaken: tuple[int, ...] = ()
    """Versions that were not made, as the one before was still being written."""
    unwritten: tuple[int, ...] = ()
    """Versions that could not be written."""

    def __add__(self, later: "Stored") -> "Stored":
        return Stored(
            self.published + later.published,
            self.checkpoints + later.checkpoints,
            self.troubles + later.troubles,
            self.overtaken + later.overtaken,
            self.unwritten + later.unwritten,
        )


@dataclass(frozen=True)
class StepResult:
    """What the training ranks report of a step: its metrics, what was `stored` since the result before, and why the
    round is trained but not exported. All of a round is stored once its last result is there."""

    metrics: StepMetrics
    stored: Stored = Stored()
    unexported: str | None = None


def parse_metrics(content: bytes) -> list[StepMetrics]:
    """The steps in the content of metrics.jsonl. DataError for a line that is no step's."""
    found = records(content, "metrics.jsonl")
    if any(not {"round", "step", "version"} <= step.keys() for step in found):
        raise DataError("metrics.jsonl: a line does not name round, step and version; remove it")
    return [StepMetrics(step.pop("round"), step.pop("step"), step.pop("version"), step) for step in found]
