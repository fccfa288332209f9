"""`sampo serve`: the live endpoint of a run, without training."""

import contextlib
import os
import sys

from rich.console import Console

from sampo_ray.config.profiles import resolve
from sampo_ray.config.run import load_config
from sampo_ray.console import session
from sampo_ray.errors import ConfigError
from sampo_ray.loop.display import open_display
from sampo_ray.run.directory import open_run


def serve_run(directory: str, overrides: list[str]) -> None:
    """Serves the run in `directory` until it is interrupted, and follows it if another process trains it."""
    for override in overrides:
        if not override.startswith(("serve.", "fleet.generators.")):
            raise ConfigError(f"override {override!r}: `sampo serve` takes serve.... and fleet.generators.... only")
    run = open_run(directory)
    tree = run.config.model_dump()
    config = load_config({**tree, "serve": {**tree["serve"], "enabled": True}}, overrides)
    session.quiet_libraries()
    from sampo_ray.loop.serving import open_live
    from sampo_ray.loop.validate import check_keys_file

    check_keys_file(config.serve.keys_file)
    session.check_port(config.serve)
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(session.library_output_to(session.driver_log(config)))
        resources = stack.enter_context(session.ray_cluster())
        config, _ = resolve(config, resources, os.cpu_count() or 1)
        with display.stage("start", None, "engine"):
            endpoint = stack.enter_context(open_live(open_run(run.place.url, config)))
        session.announce(display, endpoint)
        session.serve_until_interrupt(display, endpoint, config.serve.keyed)
