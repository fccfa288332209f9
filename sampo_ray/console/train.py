"""`sampo train`: runs a recipe, or continues a run that was interrupted.

Ray, torch and the rest are imported once the configuration is known to be sound, so that a mistake in it is reported
at once.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from sampo_ray.config.profiles import resolve
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.console import session
from sampo_ray.errors import ConfigError
from sampo_ray.loop.display import Display, open_display
from sampo_ray.run.directory import create_run, dump_config, open_run
from sampo_ray.run.lock import exclusive

CHANGEABLE = (
    "serve.",
    "fleet.",
    "run.trackers",
    "model.attention",
    "trainer.workers",
    "trainer.min_workers",
    "trainer.num_cpus",
    "trainer.checkpoint_every",
    "trainer.max_failures",
    "trainer.lifetime",
)
"""How overrides begin that a resumed run accepts: they change where and how fast it trains, not its result."""


def train(recipe: Path | None, overrides: list[str], keep_serving: bool) -> None:
    """Runs a recipe in a new run directory."""
    config = _checked(recipe, overrides)
    with exclusive(config.run.dir):
        _run(config, None, keep_serving)


def resume(directory: str, overrides: list[str], keep_serving: bool) -> None:
    """Continues the run in `directory`; a finished run is left as it is."""
    with exclusive(directory):
        run = open_run(directory)
        if run.manifest.finished:
            typer.echo(f"this run is finished; its models are in {directory}/exports")
            return
        for override in overrides:
            if not override.startswith(CHANGEABLE):
                raise ConfigError(f"override {override!r}: a resumed run keeps its method, data and sizes; drop it")
        config = load_config(run.config.model_dump(), overrides) if overrides else run.config
        _check(config)
        _run(config, directory, keep_serving)


def show(recipe: Path | None, overrides: list[str]) -> None:
    """Checks a recipe and prints its configuration as it would run here."""
    config = _checked(recipe, overrides)
    import torch

    from sampo_ray.loop.validate import check_fit

    resolved, notes = resolve(config, {"GPU": torch.cuda.device_count()}, os.cpu_count() or 1)
    check_fit(resolved)
    for note in notes:
        typer.echo(f"# {note}")
    typer.echo(dump_config(resolved), nl=False)


def _checked(recipe: Path | None, overrides: list[str]) -> RunConfig:
    if recipe is None:
        raise ConfigError("name a recipe, or a run to continue: --resume RUN_DIR")
    config = load_config(recipe, overrides)
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    session.quiet_libraries()
    from sampo_ray.loop.validate import check

    check(config)


def _run(config: RunConfig, resumed: str | None, keep_serving: bool) -> None:
    """Trains in a new run directory, or in the one of a run that is `resumed`."""
    from sampo_ray.iterate import iterate
    from sampo_ray.loop.fleet import open_fleet
    from sampo_ray.loop.validate import check_fit
    from sampo_ray.run.trackers import open_trackers

    session.check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(session.library_output_to(session.driver_log(config)))
        resources = stack.enter_context(session.ray_cluster())
        config, notes = resolve(config, resources, os.cpu_count() or 1)
        check_fit(config)
        for note in notes:
            display.note(note)
        run = open_run(resumed, config) if resumed else create_run(config)
        display.note(f"run {run.id} in {run.place.url}")
        run.log = stack.enter_context(open_trackers(config, run.place, run.id))
        with display.stage("start", None, "engines"):
            fleet = stack.enter_context(open_fleet(run, keep_serving))
        session.announce(display, fleet.endpoint)
        with _how_to_continue(display, run.place.url):
            export = iterate(run, fleet, display)
        display.note(f"model: {export.url}")
        if keep_serving and fleet.endpoint:
            session.serve_until_interrupt(display, fleet.endpoint, config.serve.keyed)


@contextlib.contextmanager
def _how_to_continue(display: Display, run_dir: str) -> Iterator[None]:
    """Tells the user how to continue when the loop is interrupted or fails."""
    try:
        yield
    except BaseException:
        display.note(f"nothing stored is lost; continue with: sampo train --resume {run_dir}")
        raise
