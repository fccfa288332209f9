"""The manifest: what of a run is finished."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, Field

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


class RoundRecord(BaseModel):
    """What the manifest knows of a round; `stages` holds each finished stage's counts."""

    index: int
    start_version: int
    steps: int | None = None
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)
    committed: bool = False


class Manifest(BaseModel):
    format: int = 1
    id: str
    packages: dict[str, str | None] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    """Fingerprint, parts and counts of the tokenized data."""
    rounds: list[RoundRecord] = Field(default_factory=list)
    checkpoint: Checkpoint | None = None
    earlier: Checkpoint | None = None
    """The one before, for when that is damaged."""
    finished: bool = False


def lineage(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """Where a run's versions come from: base, method, a hash of what decides the result, the data's fingerprint."""
    method = config.method
    decisive = config.model_dump(
        mode="json", include={"model", "data", "rounds", "method", "optim", "rollout", "reward", "run"}
    )
    decisive["run"] = config.run.seed
    recipe = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "base": config.model.path.rstrip("/").rsplit("/", 1)[-1],
        "method": f"{method.loss}/{method.reduction}, beta {method.beta:g}",
        "recipe": recipe,
        "data": manifest.data.get("fingerprint"),
    }


def read_manifest(place: Place) -> Manifest:
    """The manifest as it is now, for readers in other processes."""
    return Manifest.model_validate_json(place.at("manifest.json").read())
