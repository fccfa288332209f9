"""`sampo train` and `sampo serve`, and what they share with the demo: quiet libraries, a log file, a cluster.

Ray, torch and the rest are imported once the configuration is known to be sound, so that a mistake in it is reported
at once.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from sampo_ray.config.machines import Cluster, Node
from sampo_ray.config.placement import serving_plan
from sampo_ray.config.profiles import plan_for
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.serving import ServeConfig
from sampo_ray.config.sizing import reopened
from sampo_ray.console.gpus import check_cluster, installed, usable_here
from sampo_ray.errors import ConfigError
from sampo_ray.internals.logical_gpus import logical_gpus
from sampo_ray.loop.display import Display, open_display
from sampo_ray.run.directory import Run, create_run, dump_config, find_run, open_run
from sampo_ray.run.lock import Check, exclusive
from sampo_ray.run.reach import check_reach
from sampo_ray.run.storage import Place, absolute

if TYPE_CHECKING:
    from sampo_ray.loop.validate import Checked

LOCAL_CPUS = 16
"""Logical CPUs of a Ray that is started for one command: more than cores, since its actors share those."""
CHANGEABLE = (
    *("serve.", "fleet.", "run.trackers", "run.export_dtype", "model.attention"),
    *("profile", "trainer.workers", "trainer.min_workers", "trainer.num_cpus", "trainer.num_gpus"),
    *("trainer.checkpoint_every", "trainer.max_failures", "trainer.lifetime"),
    *("trainer.tokens_per_row", "trainer.gradient_checkpointing"),
    *("evaluate.on_collapse", "evaluate.collapse."),
)
"""How overrides begin that a resumed run accepts: they change where and how fast it trains, not what it learns."""


def train(recipe: Path | None, overrides: list[str], keep_serving: bool) -> None:
    """Runs a recipe in a new run directory."""
    checked = _checked(recipe, overrides)
    with exclusive(checked.config.run.dir, typer.echo) as check:
        _run(checked, None, keep_serving, check)


def resume(directory: str, overrides: list[str], keep_serving: bool) -> None:
    """Continues the run in `directory`; a finished run is left as it is."""
    find_run(directory)
    with exclusive(directory, typer.echo) as check:
        if (checked := _resumed(directory, overrides)) is not None:
            _run(checked, directory, keep_serving, check)


def _resumed(directory: str, overrides: list[str]) -> "Checked | None":
    """The checked configuration of the run in `directory`, which goes on; None for a finished run, which is said."""
    run = open_run(directory)
    if run.manifest.finished:
        typer.echo(f"this run is finished; its models are in {directory}/exports")
        return None
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise ConfigError(f"override {override!r}: a resumed run keeps its method, data and sizes; drop it")
    return _checked(run.config.model_dump(), overrides, run)


def show(recipe: Path | None, overrides: list[str], directory: str | None = None) -> None:
    """Checks a recipe, or how the run in `directory` goes on, and prints the configuration as it would run here."""
    checked = _resumed(directory, overrides) if directory else _checked(recipe, overrides)
    if checked is None:
        return
    from sampo_ray.console.comments import comment, first_row, plan_lines
    from sampo_ray.loop.validate import check_fit, memory_of

    def note(text: str) -> None:
        typer.echo(comment(text))

    with ray_cluster(note) if os.environ.get("RAY_ADDRESS") else contextlib.nullcontext(here(note)) as cluster:
        plan, notes = plan_for(checked.config, cluster, memory_of(checked.config))
    check_fit(plan.config)
    for each in (*checked.notes, *checked.details, *notes, *map(first_row, checked.firsts), *plan_lines(plan)):
        note(each)
    if missing := plan.missing(cluster):
        note(f"a start would wait for nodes with room for {missing}")
    typer.echo(dump_config(plan.config), nl=False)


def _checked(recipe: Path | Mapping[str, object] | None, overrides: list[str], run: Run | None = None) -> "Checked":
    """A recipe, or the configuration of a `run` that goes on, checked against the files that it names."""
    if recipe is None:
        raise ConfigError("name a recipe, or a run to continue: --resume RUN_DIR")
    config = load_config(recipe, overrides)
    check_reach(config.run.dir)
    config.serve.check_keyed()
    config.method.check_loss()
    quiet_libraries()
    from sampo_ray.loop.validate import check

    return check(config, run)


def _run(checked: "Checked", resumed: str | None, keep_serving: bool, check: Check) -> None:
    """Trains in a new run directory, or in the one of a run that is `resumed`; `check` is made before it is written."""
    from sampo_ray.console.comments import plan_lines
    from sampo_ray.iterate import iterate
    from sampo_ray.loop.fleet import open_fleet
    from sampo_ray.loop.validate import check_fit, memory_of
    from sampo_ray.run.trackers import open_trackers
    from sampo_ray.serve.endpoint import start_serve

    config = checked.config
    check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(library_output_to(driver_log(config)))
        cluster = stack.enter_context(ray_cluster(display.note))
        plan, notes = plan_for(config, cluster, memory_of(config))
        check_fit(config := plan.config)
        for note in (*checked.notes, *notes, *plan_lines(plan)):
            display.note(note)
        for note in start_serve(config.serve):  # what is refused leaves no run directory
            display.note(note)
        run = open_run(resumed, config) if resumed else create_run(config)
        display.note(f"run {run.id} in {run.place.url}")
        run.check = check
        if resumed:
            run.clear_leftovers()
        run.log = stack.enter_context(open_trackers(config, run.place, run.id))
        with display.stage("start", None, "engines"):
            fleet = stack.enter_context(open_fleet(run, keep_serving, display.note))
        announce(display, fleet.endpoint)
        try:
            export = iterate(run, fleet, display)
        except BaseException:
            display.note(f"nothing stored is lost; continue with: sampo train --resume {run.place.url}")
            raise
        display.note(f"model: {export.url}")
        if keep_serving and fleet.endpoint:
            serve_until_interrupt(display, fleet.endpoint, config.serve.keyed)


def serve(directory: str, overrides: list[str]) -> None:
    """Serves the run in `directory` until it is interrupted, and follows it if another process trains it."""
    for override in overrides:
        if not override.startswith(("serve.", "fleet.generators.")):
            raise ConfigError(f"override {override!r}: `sampo serve` takes serve.... and fleet.generators.... only")
    run = open_run(directory)
    tree = run.config.model_dump()
    config = load_config({**tree, "serve": {**tree["serve"], "enabled": True}}, overrides)
    config.serve.check_keyed()
    quiet_libraries()
    from sampo_ray.loop.fleet import open_live
    from sampo_ray.loop.validate import check_keys_file
    from sampo_ray.serve.endpoint import start_serve

    check_keys_file(config.serve.keys_file)
    check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(library_output_to(driver_log(config)))
        config = serving_plan(reopened(config), stack.enter_context(ray_cluster(display.note))).config
        for note in start_serve(config.serve):
            display.note(note)
        with display.stage("start", None, "engine"):
            endpoint = stack.enter_context(open_live(open_run(run.place.url, config), display.note))
        announce(display, endpoint)
        serve_until_interrupt(display, endpoint, config.serve.keyed)


def quiet_libraries() -> None:
    """Keeps the libraries' progress bars and advice off the terminal. Call it before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    logging.getLogger().setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def check_port(serve: ServeConfig) -> None:
    """EndpointError when the endpoint's port on this machine is taken; where Ray runs elsewhere, Ray finds out."""
    from sampo_ray.serve.endpoint import check_port

    if serve.enabled and serve.port and not os.environ.get("RAY_ADDRESS"):
        check_port(serve)


def driver_log(config: RunConfig) -> Path:
    """The file for this process's log: in a local run directory, else among this machine's temporary files."""
    place = Place(absolute(config.run.dir)).at("logs", "driver.log")
    return Path(place.path) if place.local else Path(tempfile.gettempdir()) / f"sampo-{os.getpid()}.log"


@contextlib.contextmanager
def library_output_to(path: Path) -> Iterator[None]:
    """Sends what libraries log and print in this process to a file; the display keeps the terminal."""
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


@contextlib.contextmanager
def ray_cluster(note: Callable[[str], None]) -> Iterator[Cluster]:
    """Joins the cluster at RAY_ADDRESS, or starts Ray on this machine; yields what it has. Its logs go to files.

    `note` takes a line for the user, if there is one.
    """
    import ray

    from sampo_ray.actors.nodes import cluster_now
    from sampo_ray.internals.ray import allow_slow_start, silence_services

    where, on_term = dict[str, object](), signal.getsignal(signal.SIGTERM)
    if not os.environ.get("RAY_ADDRESS"):
        (one,) = here(note).nodes
        where = {"address": "local", "num_cpus": one.cpus, "num_gpus": one.gpus, "include_dashboard": False}
    allow_slow_start()
    ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="sampo", **where)
    signal.signal(signal.SIGTERM, on_term)  # Ray sets a handler of its own
    try:
        cluster = cluster_now()
        check_cluster(0 if logical_gpus() else cluster.gpus, installed())
        yield cluster
    finally:
        ray.shutdown()
        silence_services()


def here(note: Callable[[str], None]) -> Cluster:
    """What a Ray has that is started on this machine for one command. It has the GPUs that what is installed can use;
    `note` takes a line on others.
    """
    from sampo_ray.internals.ray import gpus_here
    from sampo_ray.training.memory import device_memory

    gpus, unused = usable_here(gpus_here(), installed())
    if unused:
        note(unused)
    memory = device_memory()[1] if gpus else 0
    return Cluster((Node(gpus, LOCAL_CPUS, gpu_memory=memory, head=True),), cores=os.cpu_count() or 1)


def announce(display: Display, endpoint: str | None) -> None:
    """Shows the endpoint's address, if the run has one."""
    if endpoint:
        display.note(f"live policy: {endpoint}/v1 (model `policy`)")


def serve_until_interrupt(display: Display, endpoint: str, keyed: bool, question: str = "Hello") -> None:
    """Shows a command that sends the live policy a question, and waits for Ctrl-C."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    body = json.dumps({"model": "policy", "messages": [{"role": "user", "content": question}]})
    display.note(f"curl -i {endpoint}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    display.note("serving; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
