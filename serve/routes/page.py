"""The page's static files, and `GET /run`, which it shows: what the attached run does now and how its training goes.

Links in the files are relative, so that they work under any route prefix. The answer of `/run` is read from the run's
directory, has a bounded size, and names no path of the machine.
"""

import asyncio
import functools
import math
from collections.abc import Callable
from importlib import resources
from os.path import splitext
from typing import TypedDict

import yaml
from fastapi import FastAPI
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sampo_ray.config.run import load_config
from sampo_ray.evaluation.probe import REWARD, TASK
from sampo_ray.evaluation.records import FOLDER, RESULT, SAMPLES, TaskResult
from sampo_ray.run import lines
from sampo_ray.run.directory import Status, read_settings, read_status
from sampo_ray.run.lines import records
from sampo_ray.run.manifest import RoundRecord, StepMetrics, lineage, parse_metrics, read_manifest
from sampo_ray.run.storage import Place
from sampo_ray.serve.cached import CachedRead
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.errors import ApiError, unavailable

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
COLUMNS = ("loss", "margin", "accuracy", "chosen_tokens", "rejected_tokens")
STEPS, POINTS, ROUNDS, PROBES = 500, 250, 8, 32
TAIL_BYTES = 512 << 10  # STEPS lines of metrics.jsonl fit into it
FRESH_S, READ_TIMEOUT_S = 1.0, 10.0


def load_assets() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the page's files by name."""
    files = (resources.files("sampo_ray.serve") / "page").iterdir()
    return {file.name: (file.read_bytes(), TYPES[end]) for file in files if (end := splitext(file.name)[1]) in TYPES}


class RunView(TypedDict):
    run: str
    base: str | None
    method: str | None
    finished: bool
    alive: bool  # whether a process works on it
    round: int | None  # from 1; null before the first, as `rounds` is without a configuration
    rounds: int | None
    stage: dict[str, object] | None  # an Activity
    history: list[dict[str, object]]  # of the last rounds: round, steps, committed, start_version, stages with seconds
    probes: list[dict[str, object]]  # of versions that ended rounds, by version: label, scores by name, a few answers
    steps: dict[str, list[float | str | None]]  # columns over some of the last optimizer steps: version, round, COLUMNS


class PageRoutes:
    """Handlers of `/` and `/page/...`, whose files hold no data, so they need no key, and of `/run`."""

    assets: dict[str, tuple[bytes, str]]
    catalogue: Catalogue

    async def page(self) -> Response:
        return await self.page_asset("index.html")

    async def page_asset(self, name: str) -> Response:
        if name not in self.assets:
            raise ApiError(404, "the page has no file of that name")
        content, kind = self.assets[name]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    async def run_view(self) -> Response:
        """503 while there is no run, or its directory does not answer in time."""
        try:
            return JSONResponse(await self._view.get())
        except (OSError, ValueError, yaml.YAMLError):  # ValueError: pydantic's, JSON's and ours; no run, or not yet
            raise unavailable("the run directory cannot be read just now; try again soon") from None

    @functools.cached_property
    def _view(self) -> CachedRead[RunView]:
        """One view for all requests within FRESH_S."""
        return CachedRead(self._read, FRESH_S, READ_TIMEOUT_S)

    async def _read(self) -> RunView:
        return await asyncio.to_thread(view, await self.catalogue.run_place())


PAGE_ROUTES: dict[str, Callable[[FastAPI], object]] = {
    "page": lambda app: app.get("/"),
    "page_asset": lambda app: app.get("/page/{name}"),
    "run_view": lambda app: app.get("/run"),
}


class RedirectToPage:
    """ASGI middleware that redirects the bare route prefix to the page, with the slash that its links need.

    The redirect is relative, since a proxy in between may use another name, scheme or prefix. It is no route, because
    Ray Serve's proxy cannot match the pattern of an empty path and would count all requests as one route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")
        if scope["type"] == "http" and scope["method"] == "GET" and prefix and scope["path"] == prefix:
            await RedirectResponse(f"{prefix.rpartition('/')[2]}/")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def view(run: Place) -> RunView:
    """The view of a run directory, as JSON. OSError or ValueError when it is none."""
    manifest, status = read_manifest(run), read_status(run) or Status()
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
        "probes": probe_view(run),
    }


def probe_view(run: Place) -> list[dict[str, object]]:
    """The evaluations within the run, of the base and the last PROBES versions; for the last of them also tokens and
    rewards of its answers."""
    places = [run.at(FOLDER, name, TASK) for name in sorted(run.at(FOLDER).names())]
    found = [_stored_probe(place) for place in places if place.at(RESULT).exists()]
    kept = [*found[:1], *found[1:][-PROBES:]]
    return [*({**probe, "answers": []} for probe in kept[:-1]), *kept[-1:]]


@functools.lru_cache(maxsize=4 * PROBES)
def _stored_probe(place: Place) -> dict[str, object]:
    """A probe that is complete, and so does not change."""
    result = TaskResult.model_validate_json(place.at(RESULT).read())
    samples = records(place.at(SAMPLES).read(), SAMPLES)[:POINTS]
    scores = {score.name: {"value": score.value, "low": score.low, "high": score.high} for score in result.scores}
    answers = [(each["tokens"], each["scores"][REWARD]) for each in samples if REWARD in each["scores"]]
    return {"version": result.version, "label": result.label, "scores": scores, "answers": answers}


def last_steps(run: Place) -> list[StepMetrics]:
    """The last STEPS lines of metrics.jsonl; incomplete ones are left out."""
    raw = lines.read(run.at("metrics.jsonl"), TAIL_BYTES)
    whole = raw.partition(b"\n")[2] if len(raw) == TAIL_BYTES else raw
    return parse_metrics(whole)[-STEPS:]


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
