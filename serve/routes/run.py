"""`GET /run`: what the attached run does now and how its training goes, read from its directory.

The answer has a bounded size, and names no path of the machine.
"""

import asyncio
import functools
import math
from typing import Any, TypedDict

import yaml
from starlette.responses import JSONResponse, Response

from sampo_ray.config.run import load_config
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


class RunView(TypedDict):
    run: str
    base: str | None
    method: str | None
    finished: bool
    alive: bool
    """Whether a process works on it."""
    round: int | None
    """From 1; null before the first, as `rounds` is without a configuration."""
    rounds: int | None
    stage: dict[str, object] | None
    """See sampo_ray/run/status.py."""
    history: list[dict[str, object]]
    """The last rounds: round, steps, committed, start_version, and stages with their seconds."""
    steps: dict[str, list[float | str | None]]
    """Columns over some of the last optimizer steps: version, round and COLUMNS."""


class RunRoutes:
    """The handler of `/run`, for a class with a `catalogue`. All requests within FRESH_S share one view."""

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


def _round_view(record: RoundRecord) -> dict[str, object]:
    fields = record.model_dump(include={"start_version", "steps", "committed"})
    stages = [{"name": name, "seconds": stage.seconds} for name, stage in record.stages.items()]
    return {"round": record.index + 1, **fields, "stages": stages}


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
