"""`GET /run`: what the attached run does now and how its training goes, read from its directory.

    run, base, method           its id; what is trained, and how
    finished, alive             whether it is done; whether a process works on it
    round, rounds, stage        see sampo_ray/run/status.py; null where unknown
    history                     the last rounds: round, steps, committed, start_version, stages with their seconds
    steps                       columns over the last optimizer steps, thinned: version, round and COLUMNS

It is bounded, and names no path of the machine.
"""

import asyncio
import functools
import math
from typing import Any, TypedDict

import yaml
from starlette.responses import JSONResponse, Response

from sampo_ray.config.recipe import load_config
from sampo_ray.run.directory import read_settings
from sampo_ray.run.manifest import RoundRecord, lineage, read_manifest
from sampo_ray.run.status import Status, read_status
from sampo_ray.run.steps import StepMetrics, parse_metrics
from sampo_ray.run.storage import Place
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.errors import unavailable

COLUMNS = ("loss", "margin", "accuracy", "chosen_tokens", "rejected_tokens")
STEPS, POINTS, ROUNDS = 500, 250, 8
TAIL_BYTES = 512 << 10
"""What STEPS lines of metrics.jsonl fit into."""
FRESH_S = 1.0
READ_TIMEOUT_S = 10.0


class StageView(TypedDict):
    """A finished stage."""

    name: str
    seconds: float | None


class RoundView(TypedDict):
    """A round, counted from 1, and its finished stages."""

    round: int
    start_version: int
    steps: int | None
    committed: bool
    stages: list[StageView]


class RunView(TypedDict):
    """The answer to `GET /run`."""

    run: str
    base: str | None
    method: str | None
    finished: bool
    alive: bool
    round: int | None
    rounds: int | None
    stage: dict[str, object] | None
    history: list[RoundView]
    steps: dict[str, list[float | str | None]]


class RunRoutes:
    """The handler of `/run`; the class that has it brings a `catalogue`. A view is at most FRESH_S old, and read in a
    thread, once for all who ask.
    """

    catalogue: Catalogue

    @functools.cached_property
    def _view(self) -> CachedRead[RunView]:
        return CachedRead(self._read, FRESH_S, READ_TIMEOUT_S)

    async def run_view(self) -> Response:
        """503 while there is no run, or its directory does not answer in time."""
        try:
            return JSONResponse(await self._view.get())
        except (OSError, ValueError, yaml.YAMLError):  # ValueError: pydantic's, JSON's and ours; no run, or not yet
            raise unavailable("the run directory cannot be read just now; try again soon") from None

    async def _read(self) -> RunView:
        return await asyncio.to_thread(view, await self.catalogue.run_place())


RUN_ROUTES: dict[str, Any] = {"run_view": lambda app: app.get("/run")}


def view(run: Place) -> RunView:
    """The view of a run directory. OSError or ValueError when it is none."""
    manifest = read_manifest(run)
    status = read_status(run) or Status()
    rounds, base, method = _settings(run)
    return {
        "run": manifest.id,
        "base": base,
        "method": method,
        "finished": manifest.finished,
        "alive": status.alive(),
        "round": status.round or len(manifest.rounds) or None,
        "rounds": status.rounds or rounds,
        "stage": status.stage.model_dump() if status.stage and status.alive() else None,
        "history": [_round_view(record) for record in manifest.rounds[-ROUNDS:]],
        "steps": columns(last_steps(run)),
    }


def last_steps(run: Place) -> list[StepMetrics]:
    """The last STEPS lines of metrics.jsonl; incomplete ones are left out."""
    file = run.at("metrics.jsonl")
    raw = file.tail(TAIL_BYTES) if file.exists() else b""
    whole = raw.decode(errors="replace").splitlines()[1 if len(raw) == TAIL_BYTES else 0 :]
    return parse_metrics(whole[-STEPS:])


def columns(steps: list[StepMetrics]) -> dict[str, list[float | str | None]]:
    """At most about POINTS of the steps, by column: always the last, and others that stay the same as steps come."""
    every = -(-len(steps) // POINTS) or 1
    kept = [step for step in steps if step.version % every == 0 or step is steps[-1]]
    curves = {name: [_finite(step.values.get(name)) for step in kept] for name in COLUMNS}
    return {"version": [step.version for step in kept], "round": [step.round for step in kept], **curves}


def _round_view(record: RoundRecord) -> RoundView:
    return {
        "round": record.index + 1,
        "start_version": record.start_version,
        "steps": record.steps,
        "committed": record.committed,
        "stages": [{"name": name, "seconds": stage.seconds} for name, stage in record.stages.items()],
    }


@functools.lru_cache(maxsize=8)
def _settings(run: Place) -> tuple[int | None, str | None, str | None]:
    """Number of rounds, base model and method, which do not change; None without a configuration."""
    if not run.at("config.yaml").exists():
        return None, None, None
    config = load_config(read_settings(run))
    about = lineage(config, None)
    return config.rounds.count, about.base, about.method


def _finite(value: float | str | None) -> float | str | None:
    """JSON has neither NaN nor infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
