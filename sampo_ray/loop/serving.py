"""Serves the policy of a run, with or without training: base version, weight store, policy replicas, endpoint."""

import contextlib
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM

from sampo_ray.actors.weights.client import Channel
from sampo_ray.actors.weights.pinned import delete_apps, delete_pinned
from sampo_ray.actors.weights.publish import NewVersion, publish_version
from sampo_ray.actors.weights.store import start_weight_store
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import FleetError
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import lineage
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import VersionInfo
from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, free_port, start_serve, stop_endpoint

ATTACH_S = 120.0
PUBLISH_BASE_S = 3600.0


@contextlib.contextmanager
def open_live(run: Run) -> Iterator[str]:
    """Serves a run without training it, and follows it if it is trained elsewhere; yields the endpoint's URL."""
    name = f"serve-{run.id}"
    with contextlib.ExitStack() as stack:
        serving = PolicyServing(stack, run, name, "weights-serve.json", keep_serving=False)
        if not ray.get(serving.store.attach.remote(run.id, run.versions.url, True), timeout=ATTACH_S):
            raise FleetError(f"{run.place.url} has no version to serve yet; wait until the run has published one")
        _, endpoint = serving.deploy({f"{name}-policy": serving.policy("live", run.config.fleet.generators)}, "/")
        assert endpoint is not None
        yield endpoint


class PolicyServing:
    """The weight store, policy applications and gateway of a run, taken down with `stack`.

    They are named after `name`; the store keeps its state in the file `state` of the run directory. With `keep_serving`
    the store, the policy and the gateway stay.
    """

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

    def policy(self, channel: Channel, settings: GeneratorsConfig) -> serve.Application:
        """Replicas that serve a channel of the weight store."""
        from sampo_ray.actors.policy.deployment import policy_deployment
        from sampo_ray.actors.policy.replica_weights import WeightsSource  # importing vLLM takes many seconds

        base, chat = self._run.versions.at("000000").url, self._run.place.at("tokenizer").url
        config = self._run.config
        source = WeightsSource(
            self.store_name,
            channel,
            swap=config.serve.swap,
            drain_s=config.serve.request_timeout_s,
            transport=config.publish.transport,
        )
        return policy_deployment("policy", base, chat, source, settings, config.data.max_length)

    def deploy(self, apps: dict[str, serve.Application], route: str) -> tuple[dict[str, DeploymentHandle], str | None]:
        """Starts applications and endpoint, all at once. Returns handles and the endpoint's URL once all are ready."""
        gateway, policy = f"{self._name}-endpoint", f"{self._name}-policy"
        self._stack.callback(delete_apps, [name for name in apps if not (self._keep and name == policy)])
        if self._serve.enabled:
            deploy_endpoint(gateway, policy, self.store_name, self._serve, route)
            self._at_end(stop_endpoint, gateway)
        targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
        try:
            # There are none for an offline run without a reference, or whose reference only its trainer needs.
            handles = dict(zip(apps, serve.run_many(targets) if targets else [], strict=True))
        except RuntimeError as error:
            reason = last_error(f"{error}{deployment_errors(list(apps))}")
            raise FleetError(f"{reason} (Ray's logs have the rest)") from None
        return handles, await_endpoint(gateway, self._serve, route) if self._serve.enabled else None

    def _at_end(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._keep:
            self._stack.callback(function, *arguments)


def deployment_errors(apps: Sequence[str]) -> str:
    """A traceback for each deployment that does not run; the error of its application holds less."""
    running = serve.status().applications
    deployments = [d for name in apps if name in running for d in running[name].deployments.values()]
    return "".join(f"\n{each.message}" for each in deployments if each.status != "HEALTHY" and each.message)


def last_error(report: str) -> str:
    """The last error in Serve's report on an application that could not start."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    last = lines[errors[-1] :] if errors else lines[-1:] or ["an application could not be started"]
    return textwrap.shorten(" ".join(line for line in last if not line.startswith("For further information")), 500)


def attach_run(store: ActorHandle, run: Run) -> None:
    """Makes the store serve this run; a new run first gets its tokenizer with its template, and its version 0."""
    ray.get(store.attach.remote(run.id, run.versions.url), timeout=ATTACH_S)
    tokenizer = run.place.at("tokenizer")
    if not tokenizer.at("tokenizer_config.json").exists():
        with tokenizer.draft() as draft:
            ChatFormat.load(run.config.model.path, run.config.model.template).save(draft)
            tokenizer.take(draft)
    if not run.versions.at("000000", "version.json").exists():
        source = lineage(run.config, None)
        base = VersionInfo(version=0, round=0, step=0, created=int(time.time()), base=source.base, recipe=source.recipe)
        new = NewVersion(run.id, run.versions, base, reference=True)
        ray.get(_publish_base.remote(run.config.model.path, tokenizer, store, new), timeout=PUBLISH_BASE_S)


@ray.remote(num_cpus=0.5, max_retries=1)
def _publish_base(path: str, tokenizer: Place, store: ActorHandle, new: NewVersion) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_safetensors=True)
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    ends = model.generation_config.eos_token_id
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, chat.end_of_turn_id)]
    model.generation_config.eos_token_id = [chat.end_of_turn_id, *others]
    with tempfile.TemporaryDirectory(prefix="sampo-") as shell:
        model.config.save_pretrained(shell)
        model.generation_config.save_pretrained(shell)
        chat.save(shell)
        publish_version(store, new, model.named_parameters(), shell, PUBLISH_BASE_S)
