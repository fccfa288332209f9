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
import json
import math
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response

from sampo_ray.config.recipe import load_config
from sampo_ray.run.directory import read_settings
from sampo_ray.run.manifest import Manifest, RoundRecord, lineage, read_manifest
from sampo_ray.run.status import Status, read_status
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


class RunRoutes:
    """The handler of `/run`; the class that has it brings a `catalogue`. A view is at most FRESH_S old, and read in a
    thread, once for all who ask.
    """

    catalogue: Catalogue

    @functools.cached_property
    def _view(self) -> CachedRead[dict[str, Any]]:
        return CachedRead(self._read, FRESH_S, READ_TIMEOUT_S)

    async def run_view(self) -> Response:
        """503 while there is no run, or its directory does not answer in time."""
        try:
            return JSONResponse(await self._view.get())
        except (OSError, ValueError, yaml.YAMLError):  # ValueError: pydantic's, JSON's and ours; no run, or not yet
            raise unavailable("the run directory cannot be read just now; try again soon") from None

    async def _read(self) -> dict[str, Any]:
        return await asyncio.to_thread(view, await self.catalogue.run_place())


RUN_ROUTES: dict[str, Any] = {"run_view": lambda app: app.get("/run")}


def view(run: Place) -> dict[str, Any]:
    """The view of a run directory. OSError or ValueError when it is none."""
    manifest = read_manifest(run)
    status = read_status(run) or Status()
    rounds, about = _settings(run)
    return {
        "run": manifest.id,
        **about,
        "finished": manifest.finished,
        "alive": status.alive(),
        "round": status.round or len(manifest.rounds) or None,
        "rounds": status.rounds or rounds,
        "stage": status.stage.model_dump() if status.stage and status.alive() else None,
        "history": [_past(record) for record in manifest.rounds[-ROUNDS:]],
        "steps": columns(last_steps(run)),
    }


def last_steps(run: Place) -> list[dict[str, Any]]:
    """The last STEPS lines of metrics.jsonl; cut-off ones are left out."""
    file = run.at("metrics.jsonl")
    raw = file.tail(TAIL_BYTES) if file.exists() else b""
    whole = raw.decode(errors="replace").splitlines()[1 if len(raw) == TAIL_BYTES else 0 :]
    return [json.loads(line) for line in whole[-STEPS:] if line.endswith("}")]


def columns(steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """About POINTS of the steps at most, by column; the last, and others that stay the same as steps come."""
    every = -(-len(steps) // POINTS) or 1
    kept = [step for step in steps if step["version"] % every == 0 or step is steps[-1]]
    return {name: [_finite(step.get(name)) for step in kept] for name in ("version", "round", *COLUMNS)}


def _past(record: RoundRecord) -> dict[str, Any]:
    stages = [{"name": name, "seconds": counts.get("seconds")} for name, counts in record.stages.items()]
    fields = record.model_dump(include={"start_version", "steps", "committed"})
    return {"round": record.index + 1, **fields, "stages": stages}


@functools.lru_cache(maxsize=8)
def _settings(run: Place) -> tuple[int | None, dict[str, Any]]:
    """Number of rounds, and what else does not change."""
    if not run.at("config.yaml").exists():
        return None, {"base": None, "method": None}
    config = load_config(read_settings(run))
    about = lineage(config, Manifest(id=""))
    return config.rounds.count, {"base": about["base"], "method": about["method"]}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
