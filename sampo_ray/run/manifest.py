"""The manifest: what of a run is finished."""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
)

from sampo_ray.config.run import RunConfig
from sampo_ray.run.storage import Place
from sampo_ray.training.statistics import Statistics


class Checkpoint(BaseModel):
    """A complete trainer state: after `step` optimizer steps of `round`, for `world` ranks."""

    path: str
    round: int
    step: int
    world: int
    files: dict[str, str]
    """Checksums by file name."""
    statistics: Statistics = Statistics()
    """Of the round's steps so far, for losses that look back at them."""


class Tokenized(BaseModel):
    """The blocks that a source was tokenized into, and what became of its rows."""

    rows: list[int]
    """Of each block."""
    rows_read: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    """Rows left out, by reason."""
    prompts_cut: int = 0
    responses_cut: int = 0


class DataRecord(Tokenized):
    """The tokenized data of a run."""

    source: str
    fingerprint: str


class Age(BaseModel):
    """How many optimizer steps older than its start the weights were that a round's completions were begun with."""

    mean: float
    most: int


class StageRecord(BaseModel):
    """A finished stage of a round. Fields that a stage has no value for are not written."""

    rows: list[int] | None = None
    """Of each of its parts."""
    steps: int | None = None
    seconds: float | None = None
    age: Age | None = None
    rows_read: int | None = None
    dropped: dict[str, int] | None = None
    """What was left out, by reason."""
    prompts_cut: int | None = None
    responses_cut: int | None = None
    votes: int | None = None
    """How many votes its pairs come from."""
    left: dict[str, int] | None = None
    """Votes that made no pair, by reason."""

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class RoundRecord(BaseModel):
    """What the manifest knows of a round; `stages` holds the finished ones by name."""

    index: int
    start_version: int
    steps: int | None = None
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    committed: bool = False

    @property
    def end_version(self) -> int:
        """The version that the round ends with; where it starts, until its number of steps is known."""
        return self.start_version + (self.steps or 0)


class Manifest(BaseModel):
    format: int = 1
    id: str
    packages: dict[str, str | None] = Field(default_factory=dict)
    data: Annotated[DataRecord | None, BeforeValidator(lambda found: found or None)] = None
    """None until the data is tokenized, which is `{}` in the file."""
    rounds: list[RoundRecord] = Field(default_factory=list)
    checkpoint: Checkpoint | None = None
    earlier: Checkpoint | None = None
    """The one before, for when that is damaged."""
    finished: bool = False

    @field_serializer("data")
    def _data(self, data: DataRecord | None) -> dict[str, object]:
        return data.model_dump() if data else {}


@dataclass(frozen=True)
class Lineage:
    """Where a run's versions come from: base model, method, a hash of what decides the result, the data."""

    base: str
    method: str
    recipe: str
    data: str | None


def lineage(config: RunConfig, data: DataRecord | None) -> Lineage:
    method = config.method
    decisive = config.model_dump(
        mode="json", include={"model", "data", "rounds", "method", "optim", "rollout", "reward", "run"}
    )
    decisive["run"] = config.run.seed
    return Lineage(
        base=config.model.path.rstrip("/").rsplit("/", 1)[-1],
        method=f"{method.loss}/{method.reduction}, beta {method.beta:g}",
        recipe=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12],
        data=data.fingerprint if data else None,
    )


def read_manifest(place: Place) -> Manifest:
    """The manifest as it is now, for readers in other processes."""
    return Manifest.model_validate_json(place.at("manifest.json").read())
