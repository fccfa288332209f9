"""What commands that start Ray have in common: quiet libraries, a log file, a cluster, the endpoint's address."""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import ServeConfig
from sampo_ray.loop.display import Display
from sampo_ray.run.storage import Place, absolute

LOCAL_CPUS = 16
"""Logical CPUs of a Ray that is started for one command: more than cores, since its actors share those."""


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
def ray_cluster() -> Iterator[dict[str, float]]:
    """Joins the cluster at RAY_ADDRESS, or starts Ray on this machine; yields its resources. Its logs go to files."""
    import ray

    from sampo_ray.internals.ray import silence_services

    local = (
        {}
        if os.environ.get("RAY_ADDRESS")
        else {"address": "local", "num_cpus": LOCAL_CPUS, "include_dashboard": False}
    )
    ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="sampo", **local)
    try:
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()
        silence_services()


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
