"""The fleet of a run: weight store, generators, reference and reward workers, trainer. Started before the loop, which
uses it.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM

from sampo_ray.actors.reference import build_reference_app
from sampo_ray.actors.reward import build_reward_app
from sampo_ray.actors.trainer import Trainer
from sampo_ray.actors.weights import publish_version, start_weight_store
from sampo_ray.chat import ChatFormat
from sampo_ray.config import RunConfig
from sampo_ray.runs import Place, Run
from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, free_port, start_serve, stop_endpoint

CALL_SECONDS = 120.0
BASE_SECONDS = 3600.0


class FleetError(RuntimeError):
    """An engine or worker that does not start; the message says what it said last."""


@dataclass(frozen=True)
class Fleet:
    """Running actors. Generators and rewards are None where no stage needs them, `endpoint` where nothing is served."""

    store: ActorHandle
    trainer: Trainer
    references: DeploymentHandle
    generators: DeploymentHandle | None
    rewards: DeploymentHandle | None
    endpoint: str | None

    def attach(self, run: Run) -> None:
        """From now on the fleet works for this run: its weights are served, from its latest durable version."""
        attach(self.store, run)


@contextlib.contextmanager
def open_fleet(run: Run, keep_serving: bool = False) -> Iterator[Fleet]:
    """Starts what the run needs, waits until it is ready, and takes it down afterwards.

    With `keep_serving` the endpoint, its policy replicas and the weight store stay, and outlive this process.
    """
    config, store_name = run.config, f"sampo-{run.id}"
    store = start_weight_store(store_name, run.place.at("weights.json").url)
    with contextlib.ExitStack() as stack:
        if not keep_serving:
            stack.callback(ray.kill, store)
        serve_config = config.serve
        if serve_config.enabled and not serve_config.port:
            serve_config = serve_config.model_copy(update={"port": free_port(serve_config.host)})
        start_serve(serve_config)
        attach(store, run)
        trainer = Trainer(config.trainer, store_name, run.place.at("logs", "ray-train"))  # starts while the others do
        stack.callback(trainer.close)
        folders = [stack.enter_context(run.place.at(*at).on_disk()) for at in (("versions", "000000"), ("tokenizer",))]
        apps = applications(config, run.id, store_name, *folders)
        for name in apps:
            if not (keep_serving and name.endswith("-policy")):
                stack.callback(serve.delete, name)
        gateway, route = (
            f"{run.id}-endpoint",
            f"/{run.id}" if config.profile == "cluster" else "/",
        )  # runs share a cluster
        if serve_config.enabled:
            deploy_endpoint(gateway, f"{run.id}-policy", serve_config, route)  # starts while the engines do
            if not keep_serving:
                stack.callback(stop_endpoint, gateway)
        targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
        try:
            handles = dict(zip(apps, serve.run_many(targets), strict=True))
        except RuntimeError as error:
            raise FleetError(f"{last_words(error)} (Ray's logs have the rest)") from None
        endpoint = await_endpoint(gateway, serve_config, route) if serve_config.enabled else None
        yield Fleet(
            store,
            trainer,
            handles[f"{run.id}-references"],
            handles.get(f"{run.id}-generators") or handles.get(f"{run.id}-policy"),
            handles.get(f"{run.id}-rewards"),
            endpoint,
        )


def applications(config: RunConfig, run_id: str, store: str, base: Path, chat: Path) -> dict[str, serve.Application]:
    """The Serve applications of a run by name. On a laptop one deployment serves both rollouts and the endpoint; on a
    cluster the generators are their own, so that rollouts cannot disturb the live policy."""
    fleet = config.fleet
    threads = None if fleet.references.num_gpus else torch.get_num_threads()
    apps = {f"{run_id}-references": build_reference_app(store, fleet.references, threads)}

    def policy(name: str, settings: Any) -> None:
        from sampo_ray.actors.policy_server import policy_deployment  # importing vLLM takes many seconds

        apps[name] = policy_deployment("policy", str(base), str(chat), store, settings, config.data.max_length)

    if config.serve.enabled or (config.online and config.profile != "cluster"):
        one = fleet.generators.model_copy(update={"min_replicas": 1, "max_replicas": 1})
        policy(f"{run_id}-policy", one if config.online and config.profile == "cluster" else fleet.generators)
    if config.online and config.profile == "cluster":
        policy(f"{run_id}-generators", fleet.generators)
    if config.online:
        apps[f"{run_id}-rewards"] = build_reward_app(config.reward, fleet.rewards)
    return apps


def last_words(error: RuntimeError) -> str:
    """What a replica that could not start said last, out of Serve's report on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    return (said or lines or ["an application could not be started"])[-1]


def attach(store: ActorHandle, run: Run) -> None:
    """Makes the store serve this run. A new run gets its tokenizer with its template, and its model as version 0."""
    ray.get(store.attach.remote(run.id, run.versions.url), timeout=CALL_SECONDS)
    tokenizer = run.place.at("tokenizer")
    if not tokenizer.at("tokenizer_config.json").exists():
        with tokenizer.draft() as draft:
            ChatFormat.load(run.config.model.path, run.config.model.template).save(draft)
            tokenizer.take(draft)
    if not run.versions.at("000000", "version.json").exists():
        ray.get(_publish_base.remote(run.config.model.path, run.place, run.id, store), timeout=BASE_SECONDS)


@ray.remote(num_cpus=0.5, max_retries=1)
def _publish_base(path: str, place: Place, run_id: str, store: ActorHandle) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_safetensors=True)
    with place.at("tokenizer").on_disk() as tokenizer:
        chat = ChatFormat.load(tokenizer, "tokenizer")
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
        publish_version(
            store,
            run_id,
            place.at("versions").url,
            0,
            model.named_parameters(),
            shell,
            reference=True,
            about={"version": 0, "round": 0, "step": 0},
            timeout_s=BASE_SECONDS,
        )
