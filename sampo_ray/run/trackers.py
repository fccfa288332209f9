"""Trackers of a run's metrics: TensorBoard always, Weights & Biases and MLflow where `run.trackers` names them.

The record is metrics.jsonl in the run directory; these show it. The last two are set up with WANDB_* and MLFLOW_*.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from sampo_ray.config.run import RunConfig
from sampo_ray.errors import ConfigError, first_line
from sampo_ray.run.storage import Place

Log = Callable[[Mapping[str, float], int], None]
"""Takes one optimizer step's metrics: (values by name, global step)."""


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError when a tracker of `run.trackers` is not installed."""
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"run.trackers: {name!r} is not installed; pip install {name}, or leave it out")


@contextmanager
def open_trackers(config: RunConfig, place: Place, run_id: str) -> Iterator[Log]:
    """Opens TensorBoard under `place`/tensorboard and what `run.trackers` names; yields the `Log`.

    A remote run directory gets its TensorBoard files at the end. ConfigError when a tracker cannot be opened.
    """
    check_trackers(config)
    with ExitStack() as stack:
        logs = [stack.enter_context(_tensorboard(place.at("tensorboard")))]
        for name in config.run.trackers:
            try:
                logs.append(stack.enter_context(TRACKERS[name](config, run_id)))
            except Exception as error:  # each library has its errors for a missing login or server
                raise ConfigError(f"run.trackers: {name} cannot be opened: {first_line(error)}") from error

        def log(values: Mapping[str, float], step: int) -> None:
            for each in logs:
                each(values, step)

        yield log


@contextmanager
def _tensorboard(place: Place) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    with ExitStack() as stack:
        folder = place.path if place.local else str(stack.enter_context(place.draft()))
        if not place.local:
            stack.callback(place.take, Path(folder))
        writer = stack.enter_context(SummaryWriter(folder, flush_secs=10))

        def log(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextmanager
def _wandb(config: RunConfig, run_id: str) -> Iterator[Log]:
    import wandb

    with wandb.init(project="sampo-ray", id=run_id, resume="allow", config=config.model_dump(mode="json")) as run:
        yield lambda values, step: run.log(dict(values), step=step)


@contextmanager
def _mlflow(config: RunConfig, run_id: str) -> Iterator[Log]:
    import mlflow

    known = mlflow.search_runs(filter_string=f"attributes.run_name = '{run_id}'", output_format="list")
    with mlflow.start_run(run_id=known[0].info.run_id) if known else mlflow.start_run(run_name=run_id):
        mlflow.log_dict(config.model_dump(mode="json"), "config.yaml")

        def log(values: Mapping[str, float], step: int) -> None:
            mlflow.log_metrics(dict(values), step=step, synchronous=False)  # training must not wait for a server

        yield log


TRACKERS: dict[str, Callable[[RunConfig, str], AbstractContextManager[Log]]] = {"wandb": _wandb, "mlflow": _mlflow}
