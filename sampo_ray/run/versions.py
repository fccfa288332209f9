"""Versions of a run: their numbers, labels, folders and what their version.json says.

A *version* is a published checkpoint, numbered by the optimizer steps of the run so far.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from sampo_ray.errors import VersionError, WeightsError
from sampo_ray.run.storage import Place


@dataclass(frozen=True)
class WeightsId:
    """Which weights: the run they belong to and their version number in it."""

    run: str
    version: int

    def __str__(self) -> str:
        return f"{self.run}@{self.version}"


class AdaptersInfo(BaseModel):
    """LoRA adapters of a version: the version they are for (`base`), their rank, and the scaling of B @ A."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base: int
    rank: int
    scaling: float


class VersionInfo(BaseModel):
    """A version's version.json. Unknown keys are kept, and a key that was not set is not written."""

    model_config = ConfigDict(frozen=True, extra="allow")

    version: int
    round: int
    step: int
    """Optimizer steps within the round."""
    parent: int | None = None
    """The version that the round began with."""
    labels: tuple[str, ...] = ()
    base: str | None = None
    """The name of the model that the run began with."""
    method: str | None = None
    recipe: str | None = None
    """A hash of the settings that decide the result."""
    data: str | None = None
    """The fingerprint of the training data."""
    metrics: Mapping[str, float] = {}
    """Of the step that made this version."""
    created: int | None = None
    """Unix time."""
    adapters: AdaptersInfo | None = None
    """Set if the folder holds adapters alone."""
    files: Mapping[str, str] = {}
    """Checksums by file name."""


NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}")
"""Names that users give: of labels and adapters."""
CONTENT = re.compile(r"([0-9a-f]{32})?")
"""What tells an adapter from others: a checksum of its weights; "" for a version of adapters alone."""


def version_folder(versions_url: str, version: int) -> str:
    return f"{versions_url.rstrip('/')}/{version:06d}"


def export_folder(run: Place, round: int) -> Place:
    """Where the model after a round (from 0) of the run in `run` is exported to."""
    return run.at("exports", f"round-{round + 1}")


def is_complete(folder_url: str) -> bool:
    return Place(folder_url).at("version.json").exists()


def read_info(folder_url: str) -> VersionInfo:
    """The version.json of a complete version; WeightsError when there is none."""
    try:
        return VersionInfo.model_validate(json.loads(Place(folder_url).at("version.json").read()))
    except FileNotFoundError:
        raise WeightsError(f"{folder_url}: not a complete version (no version.json)") from None


def complete_versions(versions_url: str) -> list[int]:
    """The numbers of all complete versions under `versions_url`, ascending."""
    return [number for number in _numbers(versions_url) if is_complete(version_folder(versions_url, number))]


def newest_version(versions_url: str, after: int = -1) -> int | None:
    """The newest complete version, if it is newer than `after`."""
    newer = (number for number in reversed(_numbers(versions_url)) if number > after)
    return next((number for number in newer if is_complete(version_folder(versions_url, number))), None)


def clear_incomplete(versions_url: str) -> None:
    """Removes what is left in object storage of versions whose writers died; nobody may be writing one. On local disks
    there is nothing of the kind but drafts, which the next writer removes."""
    if not Place(versions_url).local:
        for number in _numbers(versions_url):
            if not is_complete(version_folder(versions_url, number)):
                Place(version_folder(versions_url, number)).remove()


def _numbers(versions_url: str) -> list[int]:
    return sorted(int(name) for name in Place(versions_url).names() if re.fullmatch(r"[0-9]{6,}", name))


def remove_version(folder_url: str) -> None:
    """Removes a version: what says that it is complete first, as the process may be killed in between."""
    Place(folder_url).at("version.json").remove()
    Place(folder_url).remove()


def is_version_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 12


def adapter_folder(run_url: str, name: str, content: str = "") -> str:
    """The folder of an adapter in a run directory: a user's by its content (those added before adapters had one: by its
    name), a version of adapters alone by its number. VersionError for what is none of them, which could lead anywhere.
    """
    run = run_url.rstrip("/")
    if is_version_number(name):
        return version_folder(f"{run}/versions", int(name))
    if not NAME.fullmatch(name) or not CONTENT.fullmatch(content):
        raise VersionError(f"{name!r} is no name of an adapter")
    return f"{run}/adapters/{content or name}"


def adapter_model(name: str, content: str) -> str:
    """The name that engines know an adapter by."""
    return f"policy@{name}#{content}" if content else f"policy@{name}"


def adapter_of_model(model: str) -> tuple[str, str]:
    """The name and the content of the adapter that engines know as `model`."""
    name, _, content = model.partition("@")[2].partition("#")
    return name, content


def labels_of(round: int, step: int, last: bool, rounds: int) -> list[str]:
    """The labels of a version from when it is published: `round` counts from 0, labels from 1; version 0 is `base`."""
    ends = [f"round-{round + 1}", *(["final"] if round + 1 == rounds else [])]
    return [f"round-{round + 1}/step-{step}", *(ends if last else [])]


def find(name: str, labels: Mapping[int, Sequence[str]]) -> int:
    """The version of this number or label. VersionError lists the versions on disk."""
    if is_version_number(name) and int(name) in labels:
        return int(name)
    named = [version for version, names in labels.items() if name in names]
    if not named:
        raise VersionError(f"no version {name!r} is kept; there is {listed(labels)}")
    return max(named)


def listed(labels: Mapping[int, Sequence[str]]) -> str:
    """Versions for a message: each number with its shortest label."""
    each = (f"{v} ({min(labels[v], key=len)})" if labels[v] else str(v) for v in sorted(labels))
    return ", ".join(each) or "none yet"
