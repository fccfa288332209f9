"""The command line: `sampo train`, `demo`, `serve`, `submit`, `feedback export`, and commands on versions."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sampo_ray.config.recipe import load_config
from sampo_ray.config.run import RunConfig
from sampo_ray.console.keys import app as keys_app
from sampo_ray.console.versions import add_commands
from sampo_ray.errors import ConfigError, TrainingError

app = typer.Typer(
    name="sampo",
    help="Iterative SamPO as a service on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
feedback = typer.Typer(help="What users said of the answers.", no_args_is_help=True)
app.add_typer(feedback, name="feedback")
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value ...", show_default=False)]
LOCAL_CPUS = 16
"""Logical CPUs of a Ray of our own: actors share the cores, they do not own them."""


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe", show_default=False)] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with the run in this directory.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the configuration, start nothing.")] = False,
    serve: Annotated[bool, typer.Option(help="Keep the live endpoint up when the run has ended.")] = False,
) -> None:
    """Runs a recipe, or goes on with a run that was cut off."""
    from sampo_ray.run.directory import open_run
    from sampo_ray.run.lock import exclusive

    with readable_errors():
        if resume:
            changes = [*([str(recipe)] if recipe else []), *(overrides or [])]
            with exclusive(resume):
                if open_run(resume).manifest.finished:
                    typer.echo(f"this run is finished; its models are in {resume}/exports")
                    return
                config = resumed_config(resume, changes)
                check_everything(config)
                run_training(config, resume, serve)
            return
        if recipe is None:
            raise ConfigError("name a recipe, or a run to go on with: --resume RUN_DIR")
        config = load_config(recipe, overrides or [])
        check_everything(config)
        if dry_run:
            show(config)
            return
        with exclusive(config.run.dir):
            run_training(config, None, serve)


@app.command()
def demo(
    serve: Annotated[bool, typer.Option(help="Keep the live endpoint up afterwards.")] = False,
    directory: Annotated[Path, typer.Option("--dir", help="Where the demo's run directories go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, model and runs.")] = 0,
) -> None:
    """Base, DPO, Iterative DPO and Iterative SamPO on a small task, made, trained, served and compared on this
    machine.
    """
    from sampo_ray.console.demo import run_demo

    with readable_errors():
        run_demo(directory, seed, serve)


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Overrides = None,
) -> None:
    """Runs a recipe as a job on a Ray cluster and follows its log."""
    from sampo_ray.cluster.submit import submit as submit_job

    with readable_errors():
        raise typer.Exit(submit_job(recipe, overrides or [], address, Console()))


@feedback.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The run directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="A path or fsspec URL; replaced if it is there.")],
) -> None:
    """Writes the preference pairs that a run's votes make, as `data.train` reads them."""
    from sampo_ray.run.feedback import as_jsonl, pairs_from, read_votes
    from sampo_ray.run.storage import Place, absolute

    with readable_errors():
        votes = read_votes(Place(absolute(run)))
        if not votes:
            raise ConfigError(f"{run!r} holds no feedback (nothing in feedback/votes); name a run that was given some")
        rows, left = pairs_from(votes)
        Place(absolute(out)).write(as_jsonl(rows))
        without = ", ".join(f"{n} {reason}" for reason, n in left.items())
        typer.echo(f"{len(rows)} pairs from {len(votes)} votes" + (f" (without: {without})" if without else ""))


@app.command("serve")
def serve_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory.")], overrides: Overrides = None
) -> None:
    """Serves a run without training it: finished, or while it is trained elsewhere, which is then followed."""
    from sampo_ray.loop.validate import check_keys_file
    from sampo_ray.run.directory import open_run

    with readable_errors():
        quiet_libraries()
        place = open_run(run).place
        tree = open_run(run).config.model_dump()
        config = load_config({**tree, "serve": {**tree["serve"], "enabled": True}}, serving_only(overrides))
        check_keys_file(config.serve.keys_file)
        serve_live(place.url, config)


def serving_only(overrides: list[str] | None) -> list[str]:
    for override in overrides or []:
        if not override.startswith(("serve.", "fleet.generators.")):
            raise ConfigError(f"override {override!r}: only serve.... and fleet.generators.... mean something here")
    return overrides or []


HOW_IT_TRAINS = (
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
"""What a run that is resumed may change."""


def resumed_config(directory: str, overrides: list[str]) -> RunConfig:
    """The configuration that a run was begun with, plus overrides of how (not what) it trains."""
    from sampo_ray.run.directory import open_run

    config = open_run(directory).config
    for override in overrides:
        if not override.startswith(HOW_IT_TRAINS):
            raise ConfigError(f"override {override!r}: a run that is resumed keeps its method, data and sizes; drop it")
    return load_config(config.model_dump(), overrides) if overrides else config


def check_everything(config: RunConfig) -> None:
    quiet_libraries()
    from sampo_ray.loop.validate import check

    check(config)


def show(config: RunConfig) -> None:
    """Prints the configuration as it would run here."""
    import torch

    from sampo_ray.config.profiles import resolve
    from sampo_ray.loop.validate import check_fit
    from sampo_ray.run.directory import dump_config

    resolved, notes = resolve(config, {"GPU": torch.cuda.device_count()}, os.cpu_count() or 1)
    check_fit(resolved)
    for note in notes:
        typer.echo(f"# {note}")
    typer.echo(dump_config(resolved), nl=False)


def run_training(config: RunConfig, resume: str | None, keep_serving: bool) -> None:
    from sampo_ray.config.profiles import resolve
    from sampo_ray.iterate import iterate
    from sampo_ray.loop.display import open_display
    from sampo_ray.loop.fleet import open_fleet
    from sampo_ray.loop.validate import check_fit
    from sampo_ray.run.directory import create_run, open_run
    from sampo_ray.run.trackers import open_trackers
    from sampo_ray.serve.endpoint import check_port

    if config.serve.enabled and config.serve.port and not os.environ.get("RAY_ADDRESS"):
        check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(library_output_to(driver_log(config)))
        resources = stack.enter_context(ray_cluster())
        config, notes = resolve(config, resources, os.cpu_count() or 1)
        check_fit(config)
        for note in notes:
            display.note(note)
        run = open_run(resume, config) if resume else create_run(config)
        display.note(f"run {run.id} in {run.place.url}")
        run.log = stack.enter_context(open_trackers(config, run.place, run.id))
        with display.stage("start", None, "engines"):
            fleet = stack.enter_context(open_fleet(run, keep_serving))
        announce(display, fleet.endpoint)
        with on_failure(display, run.place.url):
            export = iterate(run, fleet, display)
        display.note(f"model: {export.url}")
        if keep_serving and fleet.endpoint:
            display.note(curl_line(fleet.endpoint, config.serve.keyed))
            wait_for_interrupt(display)


def serve_live(directory: str, config: RunConfig) -> None:
    from sampo_ray.config.profiles import resolve
    from sampo_ray.loop.display import open_display
    from sampo_ray.loop.fleet import open_live
    from sampo_ray.run.directory import open_run
    from sampo_ray.serve.endpoint import check_port

    if config.serve.port and not os.environ.get("RAY_ADDRESS"):
        check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(library_output_to(driver_log(config)))
        resources = stack.enter_context(ray_cluster())
        config, _ = resolve(config, resources, os.cpu_count() or 1)
        with display.stage("start", None, "engine"):
            endpoint = stack.enter_context(open_live(open_run(directory, config)))
        announce(display, endpoint)
        display.note(curl_line(endpoint, config.serve.keyed))
        wait_for_interrupt(display)


def driver_log(config: RunConfig) -> Path:
    """Where this process's own log goes: into the run directory, or beside it on this machine if that is remote."""
    from sampo_ray.run.storage import Place, absolute

    place = Place(absolute(config.run.dir)).at("logs", "driver.log")
    return Path(place.path) if place.local else Path(tempfile.gettempdir()) / f"sampo-{os.getpid()}.log"


def announce(display: Any, endpoint: str | None) -> None:
    if endpoint:
        display.note(f"live policy: {endpoint}/v1 (model `policy`)")


def curl_line(endpoint: str, keyed: bool, question: str = "Hello") -> str:
    """A shell command that asks the live policy something."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    body = json.dumps({"model": "policy", "messages": [{"role": "user", "content": question}]})
    return f"curl -i {endpoint}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def wait_for_interrupt(display: Any) -> None:
    display.note("serving; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


@contextlib.contextmanager
def on_failure(display: Any, run_dir: str) -> Iterator[None]:
    """Says how to go on when the loop is interrupted or fails."""
    try:
        yield
    except BaseException:
        display.note(f"nothing stored is lost; go on with: sampo train --resume {run_dir}")
        raise


@contextlib.contextmanager
def ray_cluster() -> Iterator[dict[str, float]]:
    """Joins the cluster that RAY_ADDRESS names, or starts a Ray of our own; yields its resources. Its logs go to
    files.
    """
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "sampo"}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "num_cpus": LOCAL_CPUS, "include_dashboard": False}
    ray.init(**options)
    try:
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()
        # A thread of Ray's that still waits for its dashboard would complain, on the terminal, that it has gone.
        logging.getLogger("ray._private.services").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Errors that the user can mend are printed as one message, not as a stack."""
    from sampo_ray.errors import DataError, VersionError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        # What actors raise is imported only where actors are, since that takes seconds.
        if not isinstance(
            error, (ConfigError, DataError, VersionError, *(_errors_of_actors() if "ray" in sys.modules else ()))
        ):
            raise
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _errors_of_actors() -> tuple[type[BaseException], ...]:
    from sampo_ray.errors import EndpointError, FleetError, StageError, SubmitError, WeightsError

    return StageError, TrainingError, FleetError, WeightsError, EndpointError, SubmitError


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries do not belong on the user's terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    logging.getLogger().setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def library_output_to(path: Path) -> Iterator[None]:
    """Sends what libraries log and print in this process to a file, as their own processes do; the display goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root, before = logging.getLogger(), os.dup(2)
    with path.open("a", buffering=1) as file:
        handlers, root.handlers = root.handlers, [logging.StreamHandler(file)]
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            root.handlers = handlers


add_commands(app, readable_errors)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
