"""The licence of a base model: as its own files state it, and what Meta's licences ask of models made from Llama."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache

README = "README.md"
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md", "NOTICE", "NOTICE.txt")
"""Files of a model's folder that go where the model goes."""


@dataclass(frozen=True)
class Llama:
    """What a Llama licence asks of a model that is made from a Llama and given away."""

    name: str
    """As the licence calls the model."""
    prefix: str
    """What the new model's name begins with."""
    built_with: str
    licence: str

    @property
    def notice(self) -> str:
        """The text of the NOTICE file."""
        return (
            f"{self.name} is licensed under the {self.licence}, Copyright © Meta Platforms, Inc. All Rights Reserved."
        )


LLAMAS = {
    "llama3": Llama("Meta Llama 3", "Llama-3", "Built with Meta Llama 3", "Meta Llama 3 Community License"),
    **{
        f"llama3.{minor}": Llama(f"Llama 3.{minor}", "Llama", "Built with Llama", f"Llama 3.{minor} Community License")
        for minor in (1, 2, 3)
    },
}
"""By the identifier of the licence on the Hugging Face hub."""


@dataclass(frozen=True)
class Licence:
    id: str | None
    """The hub's identifier; None: not known."""
    stated: bool
    """Whether the base model's README states it; else it follows from the base model's name."""
    name: str | None
    link: str | None
    files: tuple[Path, ...]
    """Licence files of the base model that are on this machine."""

    @property
    def llama(self) -> Llama | None:
        return LLAMAS.get(self.id or "") or LLAMAS.get(self.name or "")


def licence_of(path: str) -> Licence:
    """Of a model's folder or hub name, by the files that are on this machine."""
    metadata = _metadata(path)
    stated = metadata.get("license")
    id = stated if isinstance(stated, str) else None
    files = tuple(file for name in FILES if (file := _file(path, name)) is not None)
    name, link = (_text(metadata.get(key)) for key in ("license_name", "license_link"))
    if id is not None:
        return Licence(id, True, name, link, files)
    found = re.search(r"llama[-_ ]?3(?:\.([123]))?(?![\d.])", path.rstrip("/").rpartition("/")[2], re.IGNORECASE)
    if found is None:
        return Licence(None, False, None, None, files)
    return Licence(f"llama3.{found[1]}" if found[1] else "llama3", False, None, None, files)


def write_licence(licence: Licence, folder: Path) -> tuple[str, ...]:
    """Puts the base model's licence files into a folder, and the NOTICE that Meta's licences ask for. Their names."""
    written = []
    for file in licence.files:
        shutil.copyfile(file, folder / file.name)
        written.append(file.name)
    if licence.llama is not None and "NOTICE" not in written:
        (folder / "NOTICE").write_text(licence.llama.notice + "\n", encoding="utf-8")
        written.append("NOTICE")
    return tuple(written)


def _metadata(path: str) -> dict[str, object]:
    """The YAML block of the model's README; empty where there is none that can be read."""
    file = _file(path, README)
    parts = file.read_text(encoding="utf-8", errors="replace").split("---", 2) if file else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _file(path: str, name: str) -> Path | None:
    for found in _places(path, name):
        if found.is_file():
            return found
    return None


def _places(path: str, name: str) -> Iterator[Path]:
    yield Path(path) / name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        cached = try_to_load_from_cache(path, name)
        if isinstance(cached, str):
            yield Path(cached)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
