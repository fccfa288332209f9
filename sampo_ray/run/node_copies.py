"""Versions as local files: where a run is on object storage, one copy on each node, for all of its processes there."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from sampo_ray.errors import WeightsError
from sampo_ray.run.checksums import checksum_of_file
from sampo_ray.run.scratch import shared_folder
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import read_info

ATTEMPTS = 3


@contextlib.contextmanager
def version_on_disk(folder_url: str) -> Iterator[Path]:
    """The folder of a complete version on this machine: itself, or a copy, each of its files verified.

    The first process of the machine that needs a copy downloads it, others wait for that one, and it is gone once none
    of them uses it any more. WeightsError when the version is not complete, or its files stay damaged.
    """
    place = Place(folder_url)
    if place.local:
        yield Path(place.path)
        return
    info = read_info(folder_url)
    key = hashlib.sha256(f"{place.url}\n{info.model_dump_json()}".encode()).hexdigest()[:32]
    with shared_folder(key, lambda folder: _fetch(place, info.files, folder / place.name)) as folder:
        yield folder / place.name


def _fetch(place: Place, files: Mapping[str, str], target: Path) -> None:
    """Downloads the files of a version with these checksums; all there are where it has none."""
    place.download(target, [*files, "version.json"] if files else None)
    for attempt in range(1, ATTEMPTS + 1):
        damaged = [name for name, expected in files.items() if checksum_of_file(target / name) != expected]
        if not damaged:
            return
        if attempt == ATTEMPTS:
            raise WeightsError(f"{place.url}/{damaged[0]}: its checksum is not that in version.json; it is damaged")
        place.download(target, damaged)
