"""The fleet of a run: weight store, generators, reference and reward workers, trainer. Started before the loop, which
uses it.
"""

import contextlib
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM

from sampo_ray.actors.ranks.trainer import Trainer
from sampo_ray.actors.scoring.reference import build_reference_app
from sampo_ray.actors.scoring.reward import build_reward_app
from sampo_ray.actors.weights.pinned import delete_apps, delete_pinned
from sampo_ray.actors.weights.store import NewVersion, publish_version, start_weight_store
from sampo_ray.config.fleet import GeneratorsConfig
from sampo_ray.config.run import RunConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import FleetError
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import lineage
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import VersionInfo
from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, free_port, start_serve, stop_endpoint

CALL_SECONDS = 120.0
BASE_SECONDS = 3600.0


@dataclass(frozen=True)
class Fleet:
    """Running actors. What no stage needs is None, and so is `endpoint` where nothing is served."""

    store: ActorHandle
    trainer: Trainer
    references: DeploymentHandle | None
    rewards: DeploymentHandle | None
    endpoint: str | None
    own_generators: DeploymentHandle | None
    shared_policy: DeploymentHandle | None
    start_seconds: float
    """What it took until all was ready."""

    def attach(self, run: Run) -> None:
        """From now on the fleet works for this run: its weights are served, from its latest durable version."""
        attach(self.store, run)

    def generators(self, version: int | None = None) -> DeploymentHandle:
        """The replicas to draw rollouts of a version from (None: of whatever is newest): the live policy's, where it
        may be shared and serves that, or else those that follow training.
        """
        if self.shared_policy and ray.get(self.store.serves.remote(version), timeout=CALL_SECONDS):
            return self.shared_policy
        assert self.own_generators is not None, "the configuration asks for no rollouts"
        return self.own_generators

    def start_generators(self, settings: GeneratorsConfig, weights: tuple[str, int]) -> None:
        """Has Serve start the generators that are scaled down before rollouts of these weights (run, version) are asked
        for: by calls that wait for them, as many as make it want all replicas.
        """
        scaling = settings.autoscaling
        if self.own_generators is None or self.shared_policy or scaling["min_replicas"] == scaling["max_replicas"]:
            return
        for _ in range(int(scaling["max_replicas"] * scaling["target_ongoing_requests"])):
            self.own_generators.hold.remote(weights)


@contextlib.contextmanager
def open_fleet(run: Run, keep_serving: bool = False) -> Iterator[Fleet]:
    """Starts what the run needs, waits until it is ready, and takes it down afterwards.

    With `keep_serving` the endpoint, its policy replicas and the weight store stay, and outlive this process.
    """
    config, started = run.config, time.monotonic()
    with contextlib.ExitStack() as stack:
        live = _Live(stack, run, run.id, "weights.json", keep_serving)
        trainer = Trainer(config.trainer, live.store_name, run.place.at("logs", "ray-train"))  # starts beside the rest
        stack.callback(trainer.close)
        attach(live.store, run)
        apps = applications(run, live)
        # Runs may share a cluster, and its one proxy.
        handles, endpoint = live.deploy(apps, f"/{run.id}" if config.profile == "cluster" else "/")
        policy, generators = handles.get(f"{run.id}-policy"), handles.get(f"{run.id}-generators")
        yield Fleet(
            live.store,
            trainer,
            handles.get(f"{run.id}-references"),
            handles.get(f"{run.id}-rewards"),
            endpoint,
            generators,
            policy if is_shared(config) else None,
            time.monotonic() - started,
        )


@contextlib.contextmanager
def open_live(run: Run) -> Iterator[str]:
    """Serves a run without training it, and follows it if it is trained elsewhere; yields the endpoint's URL."""
    name = f"serve-{run.id}"
    with contextlib.ExitStack() as stack:
        live = _Live(stack, run, name, "weights-serve.json", keep_serving=False)
        if not ray.get(live.store.attach.remote(run.id, run.versions.url, True), timeout=CALL_SECONDS):
            raise FleetError(f"{run.place.url} has no version to serve yet; wait until the run has published one")
        _, endpoint = live.deploy({f"{name}-policy": live.policy("live", run.config.fleet.generators)}, "/")
        assert endpoint is not None
        yield endpoint


class _Live:
    """What the endpoint of a run is made of, whoever trains it: weight store, policy applications, gateway."""

    def __init__(self, stack: contextlib.ExitStack, run: Run, name: str, state: str, keep_serving: bool) -> None:
        self._stack, self._run, self._name, self._keep = stack, run, name, keep_serving
        self.store_name = f"sampo-{name}"
        self.store = start_weight_store(self.store_name, run.place.at(state).url, name)
        self._at_end(ray.kill, self.store)
        self._serve = run.config.serve
        if self._serve.enabled and not self._serve.port:
            self._serve = self._serve.model_copy(update={"port": free_port(self._serve.host)})
        start_serve(self._serve)
        self._at_end(delete_pinned, name)

    def policy(self, channel: str, settings: GeneratorsConfig) -> serve.Application:
        """Replicas that serve a channel of the weight store."""
        from sampo_ray.actors.policy.deployment import policy_deployment
        from sampo_ray.actors.policy.server import Source  # importing vLLM takes many seconds

        base, chat = self._run.versions.at("000000").url, self._run.place.at("tokenizer").url
        config = self._run.config
        source = Source(
            self.store_name,
            channel,  # type: ignore[arg-type]
            swap=config.serve.swap,
            drain_s=config.serve.request_timeout_s,
            transport=config.publish.transport,
        )
        return policy_deployment("policy", base, chat, source, settings, config.data.max_length)

    def deploy(self, apps: dict[str, serve.Application], route: str) -> tuple[dict[str, DeploymentHandle], str | None]:
        """Starts applications and endpoint, all at once; their handles and the endpoint's URL, once all are ready."""
        gateway, policy = f"{self._name}-endpoint", f"{self._name}-policy"
        self._stack.callback(delete_apps, [name for name in apps if not (self._keep and name == policy)])
        if self._serve.enabled:
            deploy_endpoint(gateway, policy, self.store_name, self._serve, route)
            self._at_end(stop_endpoint, gateway)
        targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
        try:
            # An offline run whose reference nobody but its trainer needs, or which has none, has no applications.
            handles = dict(zip(apps, serve.run_many(targets) if targets else [], strict=True))
        except RuntimeError as error:
            raise FleetError(f"{last_words(f'{error}{said_by(list(apps))}')} (Ray's logs have the rest)") from None
        return handles, await_endpoint(gateway, self._serve, route) if self._serve.enabled else None

    def _at_end(self, function: Callable[..., Any], *arguments: Any) -> None:
        if not self._keep:
            self._stack.callback(function, *arguments)


def is_shared(config: RunConfig) -> bool:
    """Whether rollouts may be drawn from the live policy's replicas: on one machine, while it serves what is newest."""
    steady = config.serve.follow == "latest" and not config.serve.gates.any
    return config.serve.enabled and steady and config.profile != "cluster"


def applications(run: Run, live: _Live) -> dict[str, serve.Application]:
    """The Serve applications of a run by name.

    Rollouts have replicas of their own, so that they cannot disturb the live policy; where they may share its replicas,
    their own start only when the live policy is made to serve something else (a rollback).
    """
    config, fleet = run.config, run.config.fleet
    apps: dict[str, serve.Application] = {}
    if config.reference_workers:
        threads = None if fleet.references.num_gpus else torch.get_num_threads()
        apps[f"{run.id}-references"] = build_reference_app(live.store_name, fleet.references, threads)
    if config.serve.enabled:
        one = fleet.generators.model_copy(update={"min_replicas": 1, "max_replicas": 1})
        apps[f"{run.id}-policy"] = live.policy("live", fleet.generators if is_shared(config) else one)
    if config.online or config.serve.gates.probing:
        seldom = fleet.generators.model_copy(update={"min_replicas": 0})
        needed = config.online and not is_shared(config)
        apps[f"{run.id}-generators"] = live.policy("training", fleet.generators if needed else seldom)
    if config.online:
        apps[f"{run.id}-rewards"] = build_reward_app(config.reward, fleet.rewards)
    return apps


def said_by(apps: Sequence[str]) -> str:
    """What Serve reports of the deployments that do not run, a traceback each; it tells their application less."""
    running = serve.status().applications
    deployments = [d for name in apps if name in running for d in running[name].deployments.values()]
    return "".join(f"\n{each.message}" for each in deployments if each.status != "HEALTHY" and each.message)


def last_words(report: str) -> str:
    """What a replica that could not start said last, out of Serve's report on it: the last error and its lines."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    said = lines[errors[-1] :] if errors else lines[-1:] or ["an application could not be started"]
    return textwrap.shorten(" ".join(line for line in said if not line.startswith("For further information")), 500)


def attach(store: ActorHandle, run: Run) -> None:
    """Makes the store serve this run. A new run gets its tokenizer with its template, and its model as version 0."""
    ray.get(store.attach.remote(run.id, run.versions.url), timeout=CALL_SECONDS)
    tokenizer = run.place.at("tokenizer")
    if not tokenizer.at("tokenizer_config.json").exists():
        with tokenizer.draft() as draft:
            ChatFormat.load(run.config.model.path, run.config.model.template).save(draft)
            tokenizer.take(draft)
    if not run.versions.at("000000", "version.json").exists():
        source = lineage(run.config, None)
        base = VersionInfo(version=0, round=0, step=0, created=int(time.time()), base=source.base, recipe=source.recipe)
        new = NewVersion(run.id, run.versions, base, reference=True)
        ray.get(_publish_base.remote(run.config.model.path, tokenizer, store, new), timeout=BASE_SECONDS)


@ray.remote(num_cpus=0.5, max_retries=1)
def _publish_base(path: str, tokenizer: Place, store: ActorHandle, new: NewVersion) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_safetensors=True)
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    model.generation_config.eos_token_id = [
        chat.end_of_turn_id,
        *(e for e in ends if e not in (None, chat.end_of_turn_id)),
    ]
    with tempfile.TemporaryDirectory(prefix="sampo-") as shell:
        model.config.save_pretrained(shell)
        model.generation_config.save_pretrained(shell)
        chat.save(shell)
        publish_version(store, new, model.named_parameters(), shell, BASE_SECONDS)
