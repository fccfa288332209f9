"""The fleet of a run: weight store, policy replicas, endpoint, reference and reward workers, trainer."""

import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from transformers import PreTrainedModel

from sampo_ray.actors.guard import start_guard
from sampo_ray.actors.nodes import cluster_now
from sampo_ray.actors.scoring.workers import build_reference_app, build_reward_app
from sampo_ray.actors.waiting import Need, Wait
from sampo_ray.actors.weights.client import Channel
from sampo_ray.actors.weights.pinned import delete_apps, delete_pinned
from sampo_ray.actors.weights.publish import NewVersion, publish_version
from sampo_ray.actors.weights.store import start_weight_store
from sampo_ray.actors.weights.turns import Turn
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import FleetError, StageError, UserError
from sampo_ray.internals.logical_gpus import logical_gpus
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.loop.checks import await_checks
from sampo_ray.loop.starting import Places, needs_of, run_apps
from sampo_ray.loop.turns import give_gpus, return_gpus
from sampo_ray.run.addresses import remove_address, write_address
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import lineage
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import VersionInfo, WeightsId
from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, start_serve, stop_endpoint
from sampo_ray.training.loading import load_model
from sampo_ray.training.model_files import ModelFiles
from sampo_ray.training.pretrained import is_tied
from sampo_ray.training.saving import Cast, SavedModel

if TYPE_CHECKING:
    from sampo_ray.actors.ranks.trainer import Trainer

logger = logging.getLogger(__name__)
STORE_ANSWER_S, ATTACH_S, PUBLISH_BASE_S = 120.0, 120.0, 3600.0


@dataclass(frozen=True)
class Fleet:
    """Running actors. What no stage needs is None, and so is `endpoint` where nothing is served."""

    store: ActorHandle
    trainer: "Trainer"
    references: DeploymentHandle | None
    rewards: DeploymentHandle | None
    endpoint: str | None
    separate_generators: DeploymentHandle | None
    shared_policy: DeploymentHandle | None
    wait: Wait
    places: Places
    start_seconds: float  # until all was ready
    shares_gpus: bool = False  # engines and ranks, by time

    def attach(self, run: Run) -> None:
        """Makes the fleet serve this run, from its latest durable version."""
        attach_run(self.store, run, self.wait, self.places)

    def give_gpus(self, turn: Turn) -> None:
        """Wakes the engines, or puts them to sleep and waits until they have left the GPUs; see `loop/turns.py`."""
        if self.shares_gpus:
            give_gpus(self.store, turn)

    def await_checks(self, note: Callable[[str], None]) -> None:
        """Waits until the newest version has been checked; see `loop/checks.py`."""
        await_checks(self.store, note)

    def generators(self, version: int | None = None) -> DeploymentHandle:
        """The replicas for rollouts of a version (None: of the newest): the live policy's where they may be shared and
        serve it, else those that follow training. StageError where there is no room for these.
        """
        if self.shared_policy and ray.get(self.store.serves.remote(version), timeout=STORE_ANSWER_S):
            return self.shared_policy
        if self.separate_generators is None:
            raise StageError(
                "the live policy does not serve the newest version, and on GPUs that engines and ranks share by time "
                "there is room for no other; promote `latest`, and resume the run"
            )
        return self.separate_generators

    def start_generators(self, settings: GeneratorsConfig, weights: tuple[str, int]) -> None:
        """Makes Serve start all generators: with as many calls that wait for (run, version) `weights` as they take."""
        scaling = settings.autoscaling
        if self.separate_generators is None or self.shared_policy or scaling["min_replicas"] == scaling["max_replicas"]:
            return
        for _ in range(int(scaling["max_replicas"] * scaling["target_ongoing_requests"])):
            self.separate_generators.hold.remote(WeightsId(*weights))


@contextlib.contextmanager
def open_fleet(run: Run, keep_serving: bool = False, note: Callable[[str], None] = logger.info) -> Iterator[Fleet]:
    """Starts what the run needs, waits until it is ready, and takes it down afterwards. `note` takes lines on nodes
    that are waited for; FleetError where nothing comes any more.

    With `keep_serving` the endpoint, its policy replicas and the weight store stay, and outlive this process.
    """
    from sampo_ray.actors.ranks.trainer import Trainer, resources_of  # takes seconds, which `sampo serve` saves

    config, started = run.config, time.monotonic()
    with contextlib.ExitStack() as stack:
        places = Places(config, cluster_now())
        serving = PolicyServing(stack, run, run.id, "weights.json", places, keep_serving)
        if keep_serving and config.shares_gpus:
            stack.callback(return_gpus, serving.store)  # once the ranks have ended
        ranks = places.of("ranks")
        rank = Need("ranks", (resources_of(config.trainer, ranks),), "trainer.workers")
        wait, logs = Wait([rank, places.store], note, config.fleet.start_timeout_s), run.place.at("logs", "ray-train")
        trainer = Trainer(config.trainer, serving.store_name, logs, wait, ranks)  # starts meanwhile
        stack.callback(trainer.close)
        attach_run(serving.store, run, wait, places)
        apps = applications(run, serving, places)
        if config.shares_gpus and config.trainer.num_gpus:
            trainer.await_ranks()  # one on each GPU; engines go beside them, while Ray would put two on one before
        handles, endpoint = serving.deploy(apps, wait)
        trainer.await_nodes()
        policy, generators = handles.get(f"{run.id}-policy"), handles.get(f"{run.id}-generators")
        references, rewards = handles.get(f"{run.id}-references"), handles.get(f"{run.id}-rewards")
        shared, seconds = policy if is_shared(config) else None, time.monotonic() - started
        started_with = wait, places, seconds, config.shares_gpus
        yield Fleet(serving.store, trainer, references, rewards, endpoint, generators, shared, *started_with)


def is_shared(config: RunConfig) -> bool:
    """Whether rollouts may use the live policy's replicas."""
    return config.shared_replicas


def applications(run: Run, serving: "PolicyServing", places: Places) -> dict[str, serve.Application]:
    """The Serve applications of a run by name.

    Rollouts have separate replicas, so that they cannot disturb the live policy. Where they may share its replicas, the
    separate ones start only when the live policy serves another version (a rollback).
    """
    config, fleet = run.config, run.config.fleet
    apps: dict[str, serve.Application] = {}
    if config.reference_workers:
        threads = torch.get_num_threads() if not fleet.references.num_gpus or logical_gpus() else None
        apps[f"{run.id}-references"] = build_reference_app(fleet.references, threads, places.of("references"))
    if config.serve.enabled:
        apps[f"{run.id}-policy"] = serving.policy("live", places.sized("policy", fleet.generators))
    one_engine = config.shares_gpus and config.serve.enabled  # on each GPU: there is no room for another
    if not one_engine and (config.online or config.probes):
        apps[f"{run.id}-generators"] = serving.policy("training", places.sized("generators", fleet.generators))
    if config.scores:
        apps[f"{run.id}-rewards"] = build_reward_app(
            config.reward, fleet.rewards, places.of("rewards"), run.place.at("verdicts")
        )
    return apps


@contextlib.contextmanager
def open_live(run: Run, note: Callable[[str], None] = logger.info) -> Iterator[str]:
    """Serves a run without training it, and follows it if it is trained elsewhere; yields the endpoint's URL. `note`:
    as that of `open_fleet`."""
    name = f"serve-{run.id}"
    with contextlib.ExitStack() as stack:
        places = Places(run.config, cluster_now())
        serving = PolicyServing(stack, run, name, "weights-serve.json", places, keep_serving=False)
        apps = {f"{name}-policy": serving.policy("live", run.config.fleet.generators)}
        wait = Wait([places.store], note, run.config.fleet.start_timeout_s)
        if not wait.get(serving.store.attach.remote(run.id, run.versions.url, True), ATTACH_S):
            raise FleetError(f"{run.place.url} has no version to serve yet; wait until the run has published one")
        _, endpoint = serving.deploy(apps, wait)
        assert endpoint is not None
        yield endpoint


def routes_of(name: str, profile: str) -> list[str]:
    """Routes for an endpoint, the best first. Runs on a cluster share its proxy: there it is its own, whatever else
    runs. A laptop's run takes `/`, unless another has it.
    """
    return [f"/{name}"] if profile == "cluster" else ["/", f"/{name}"]


class PolicyServing:
    """The weight store, policy applications and gateway of a run, taken down with `stack`.

    They are named after `name`; the store keeps its state in the file `state` of the run directory. With `keep_serving`
    the store, the policy and the gateway stay.
    """

    def __init__(
        self, stack: contextlib.ExitStack, run: Run, name: str, state: str, places: Places, keep_serving: bool
    ) -> None:
        self._stack, self._run, self._name, self._keep = stack, run, name, keep_serving
        self._serve, self._places = run.config.serve, places
        start_serve(self._serve)  # first, since it may be refused
        self.store_name = f"sampo-{name}"
        if os.environ.get("RAY_ADDRESS"):  # a Ray that this process has started ends with it
            keeps = [f"{name}-{each}" for each in ("endpoint", "policy", "pinned-")] if keep_serving else []
            stack.callback(ray.kill, start_guard(name, keeps, self.store_name))
        self.store = start_weight_store(self.store_name, run.place.at(state).url, name, places.of("store"))
        self._at_end(delete_pinned, name)
        self._at_end(ray.kill, self.store)  # before: it would start them again

    def policy(self, channel: Channel, settings: GeneratorsConfig) -> serve.Application:
        """Replicas that serve a channel of the weight store."""
        from sampo_ray.actors.policy.deployment import policy_deployment, with_tools
        from sampo_ray.actors.policy.replica_weights import WeightsSource  # importing vLLM takes many seconds

        base, tokenizer = self._run.versions.at("000000").url, self._run.place.at("tokenizer")
        config = self._run.config
        settings = with_tools(settings, config.serve.tools, tokenizer)
        swap, drain_s = config.serve.swap, config.serve.request_timeout_s
        transport = config.publish.transport
        turns = config.shares_gpus
        source = WeightsSource(
            self.store_name, channel, swap=swap, drain_s=drain_s, transport=transport, takes_turns=turns
        )
        where = self._places.of("policy" if channel == "live" else "generators")
        return policy_deployment("policy", base, tokenizer.url, source, settings, config.data.max_length, where)

    def deploy(self, apps: dict[str, serve.Application], wait: Wait) -> tuple[dict[str, DeploymentHandle], str | None]:
        """Starts applications and endpoint, all at once. Returns handles and the endpoint's URL once all are ready."""
        gateway, policy, route = f"{self._name}-endpoint", f"{self._name}-policy", ""
        self._stack.callback(delete_apps, [name for name in apps if not (self._keep and name == policy)])
        if self._serve.enabled:
            routes = routes_of(self._name, self._run.config.profile)
            route = deploy_endpoint(gateway, policy, self.store_name, self._serve, routes)
            self._at_end(stop_endpoint, gateway)
        wait.add(needs_of(apps))
        handles = run_apps(apps, wait)
        if not self._serve.enabled:
            return handles, None
        url = await_endpoint(gateway, route, wait.look)
        write_address(self._run.place, self._name, url)
        self._at_end(remove_address, self._run.place, self._name)
        return handles, url

    def _at_end(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._keep:
            self._stack.callback(function, *arguments)


def attach_run(store: ActorHandle, run: Run, wait: Wait, places: Places) -> None:
    """Makes the store serve this run; a new run first gets its tokenizer with its template, and its version 0."""
    wait.get(store.attach.remote(run.id, run.versions.url), ATTACH_S)
    tokenizer = run.place.at("tokenizer")
    if not tokenizer.at("tokenizer_config.json").exists():
        with tokenizer.draft() as draft:
            ChatFormat.load(run.config.model.path, run.config.model.template).save(draft)
            tokenizer.take(draft)
    if not run.versions.at("000000", "version.json").exists():
        source = lineage(run.config, None)
        base = VersionInfo(version=0, round=0, step=0, created=int(time.time()), base=source.base, recipe=source.recipe)
        new = NewVersion(run.id, run.versions, base)
        publish = _publish_base.options(**places.of("base publish", 2 * model_bytes(run.config.model.path)).options)
        published = publish.remote(run.config.model.path, tokenizer, store, new, run.config.run.export_dtype)
        try:
            wait.get(published, PUBLISH_BASE_S)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # without the remote traceback
                raise error.cause from None
            raise


def model_bytes(path: str) -> int:
    """Bytes of a model's weights in 16 bits."""
    files = ModelFiles.find("model.path", path)
    return sum(2 * math.prod(weight.shape) for weight in files.weights(files.settings("config.json")).values())


@ray.remote(num_cpus=0.5, max_retries=1)
def _publish_base(path: str, tokenizer: Place, store: ActorHandle, new: NewVersion, export_dtype: str | None) -> None:
    model = load_model(path)
    if export_dtype == "float16":  # at the end of the training it would be late
        cast = Cast(torch.float16)
        deque(SavedModel(model).tensors(cast), maxlen=0)
        cast.check()
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    with scratch_folder() as shell:
        write_shell(model, chat, shell)
        publish_version(store, new, saved_tensors(model), str(shell), PUBLISH_BASE_S)


def write_shell(model: PreTrainedModel, chat: ChatFormat, folder: Path) -> None:
    """Writes what a version has besides its weights: configuration, generation configuration and tokenizer.

    The generation configuration is the model's, with the end of turn as a further end. `save_pretrained` would refuse
    many that are in use, such as a temperature without `do_sample`; vLLM reads them as they are.
    """
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and not is_tied(model):
            config.tie_word_embeddings = False  # transformers leaves a head that differs from the embeddings as it is
    model.config.save_pretrained(folder)
    ends = model.generation_config.eos_token_id
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, chat.end_of_turn_id)]
    model.generation_config.eos_token_id = [chat.end_of_turn_id, *others]
    model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    chat.save(folder)
