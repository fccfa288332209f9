"""Which versions a run has: folders `versions/<number>/`, complete once their version.json exists."""

import json
import re
from dataclasses import dataclass
from typing import Any

import fsspec

from sampo_ray.errors import WeightsError


@dataclass(frozen=True)
class WeightsId:
    """Which weights: the run they belong to and their version number in it."""

    run: str
    version: int

    def __str__(self) -> str:
        return f"{self.run}@{self.version}"


def version_folder(versions_url: str, version: int) -> str:
    return f"{versions_url.rstrip('/')}/{version:06d}"


def is_complete(folder_url: str) -> bool:
    fs, folder = fsspec.core.url_to_fs(folder_url)
    return bool(fs.exists(f"{folder}/version.json"))


def read_about(folder_url: str) -> dict[str, Any]:
    """The version.json of a complete version; WeightsError when there is none."""
    fs, folder = fsspec.core.url_to_fs(folder_url)
    try:
        return json.loads(fs.cat_file(f"{folder}/version.json"))
    except FileNotFoundError:
        raise WeightsError(f"{folder_url}: not a complete version (no version.json)") from None


def complete_versions(versions_url: str) -> list[int]:
    """The numbers of all complete versions under `versions_url`, ascending."""
    fs, folder = fsspec.core.url_to_fs(versions_url)
    if not fs.exists(folder):
        return []
    fs.invalidate_cache()
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    numbers = sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))
    return [number for number in numbers if fs.exists(f"{version_folder(folder, number)}/version.json")]
