"""The fleet of a run: weight store, generators, reference and reward workers, trainer. Started before the loop."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from sampo_ray.actors.ranks.trainer import Trainer
from sampo_ray.actors.scoring.workers import build_reference_app, build_reward_app
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.loop.serving import PolicyServing, attach_run
from sampo_ray.run.directory import Run
from sampo_ray.run.version_folders import WeightsId

STORE_ANSWER_S = 120.0


@dataclass(frozen=True)
class Fleet:
    """Running actors. What no stage needs is None, and so is `endpoint` where nothing is served."""

    store: ActorHandle
    trainer: Trainer
    references: DeploymentHandle | None
    rewards: DeploymentHandle | None
    endpoint: str | None
    separate_generators: DeploymentHandle | None
    shared_policy: DeploymentHandle | None
    start_seconds: float
    """What it took until all was ready."""

    def attach(self, run: Run) -> None:
        """Makes the fleet serve this run, from its latest durable version."""
        attach_run(self.store, run)

    def generators(self, version: int | None = None) -> DeploymentHandle:
        """The replicas for rollouts of a version (None: of the newest): the live policy's where they may be shared and
        serve it, else those that follow training.
        """
        if self.shared_policy and ray.get(self.store.serves.remote(version), timeout=STORE_ANSWER_S):
            return self.shared_policy
        assert self.separate_generators is not None, "the configuration asks for no rollouts"
        return self.separate_generators

    def start_generators(self, settings: GeneratorsConfig, weights: tuple[str, int]) -> None:
        """Makes Serve start all generators: with as many calls that wait for weights (run, version) as all replicas of
        the fleet should have.
        """
        scaling = settings.autoscaling
        if self.separate_generators is None or self.shared_policy or scaling["min_replicas"] == scaling["max_replicas"]:
            return
        for _ in range(int(scaling["max_replicas"] * scaling["target_ongoing_requests"])):
            self.separate_generators.hold.remote(WeightsId(*weights))


@contextlib.contextmanager
def open_fleet(run: Run, keep_serving: bool = False) -> Iterator[Fleet]:
    """Starts what the run needs, waits until it is ready, and takes it down afterwards.

    With `keep_serving` the endpoint, its policy replicas and the weight store stay, and outlive this process.
    """
    config, started = run.config, time.monotonic()
    with contextlib.ExitStack() as stack:
        serving = PolicyServing(stack, run, run.id, "weights.json", keep_serving)
        trainer = Trainer(config.trainer, serving.store_name, run.place.at("logs", "ray-train"))  # starts meanwhile
        stack.callback(trainer.close)
        attach_run(serving.store, run)
        apps = applications(run, serving)
        # Runs on one cluster share its proxy.
        handles, endpoint = serving.deploy(apps, f"/{run.id}" if config.profile == "cluster" else "/")
        policy, generators = handles.get(f"{run.id}-policy"), handles.get(f"{run.id}-generators")
        yield Fleet(
            serving.store,
            trainer,
            handles.get(f"{run.id}-references"),
            handles.get(f"{run.id}-rewards"),
            endpoint,
            generators,
            policy if is_shared(config) else None,
            time.monotonic() - started,
        )


def is_shared(config: RunConfig) -> bool:
    """Whether rollouts may use the live policy's replicas: on one machine, as long as it serves the newest version."""
    steady = config.serve.follow == "latest" and not config.serve.gates.any
    return config.serve.enabled and steady and config.profile != "cluster"


def applications(run: Run, serving: PolicyServing) -> dict[str, serve.Application]:
    """The Serve applications of a run by name.

    Rollouts have separate replicas, so that they cannot disturb the live policy. Where they may share its replicas, the
    separate ones start only when the live policy serves another version (a rollback).
    """
    config, fleet = run.config, run.config.fleet
    apps: dict[str, serve.Application] = {}
    if config.reference_workers:
        threads = None if fleet.references.num_gpus else torch.get_num_threads()
        apps[f"{run.id}-references"] = build_reference_app(serving.store_name, fleet.references, threads)
    if config.serve.enabled:
        one = fleet.generators.model_copy(update={"min_replicas": 1, "max_replicas": 1})
        apps[f"{run.id}-policy"] = serving.policy("live", fleet.generators if is_shared(config) else one)
    if config.online or config.serve.gates.probing:
        from_zero = fleet.generators.model_copy(update={"min_replicas": 0})
        needed = config.online and not is_shared(config)
        apps[f"{run.id}-generators"] = serving.policy("training", fleet.generators if needed else from_zero)
    if config.online:
        apps[f"{run.id}-rewards"] = build_reward_app(config.reward, fleet.rewards)
    return apps
