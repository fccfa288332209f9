"""An endpoint for what is evaluated: the run's own if it is live, else one that is started for it and taken down."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import ray

from sampo_ray.config.machines import Cluster
from sampo_ray.config.placement import serving_plan
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.serving import ServeConfig
from sampo_ray.config.sizing import reopened
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.plans import Plan
from sampo_ray.evaluation.targets import Chosen, Target
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.loop.fleet import open_live, write_shell
from sampo_ray.run.addresses import read_addresses
from sampo_ray.run.commands import Command, Pin, Promote, Unpin, apply_once, new_id
from sampo_ray.run.directory import Run, dump_config, read_status
from sampo_ray.run.manifest import Manifest
from sampo_ray.run.report import read_reports, worst
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.serving import edit_serving, read_serving
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo, complete_versions, read_info, version_folder
from sampo_ray.training.loading import load_model

LOOK_S, ANSWER_S, START_S, COPY_S = 1.0, 30.0, 1800.0, 3600.0
OWN_REQUEST_S = 3600.0
"""Seconds that a request may take of an endpoint that nobody else uses."""
NEW = "new"
"""In place of an endpoint's URL: start one, even where the run has one."""


class Endpoint(Protocol):
    """Answers for versions of a run, `policy@N`. `run`: the identity that it names; `request_s`: seconds that it gives
    a request."""

    @property
    def url(self) -> str: ...

    @property
    def run(self) -> str: ...

    @property
    def request_s(self) -> float: ...

    @property
    def key(self) -> str | None: ...

    def serving(self, chosen: Chosen) -> AbstractContextManager[None]:
        """While the version answers and cannot change."""


@dataclass(frozen=True)
class Live:
    """A run's endpoint that somebody else has started."""

    of: Run
    url: str
    key: str | None

    @property
    def run(self) -> str:
        return self.of.id

    @property
    def request_s(self) -> float:
        return self.of.config.serve.request_timeout_s

    def serves_run(self) -> bool:
        return any(each.get("metadata", {}).get("run") == self.run for each in cards(self.url, self.key))

    def check(self, plan: Plan) -> None:
        """EvaluationError for a task whose requests this endpoint's limits would refuse."""
        serve, about = self.of.config.serve, plan.conditions
        asked = {"max_prompt_tokens": about.longest_prompt, "max_answer_tokens": about.max_tokens}
        for name, tokens in asked.items():
            most = getattr(serve, name)
            if most is not None and tokens is not None and tokens > most:
                raise EvaluationError(
                    f"{plan.task.name}: it needs {tokens:,} tokens, and this endpoint takes serve.{name}={most:,}; use "
                    "--endpoint new, or serve the run without that limit"
                )

    @contextlib.contextmanager
    def serving(self, chosen: Chosen) -> Iterator[None]:
        """Pins the version for the time, unless it is pinned already, or is live and the run is not trained."""
        assert chosen.version is not None
        version, status, now = chosen.version, read_status(self.of.place), self._card(chosen.version)
        if now is not None and (now["state"] == "pinned" or not (status and status.alive())):
            yield
            return
        _change(self.of.place, Pin(str(version)))
        try:
            self._await_pin(version)
            yield
        finally:
            _change(self.of.place, Unpin(str(version)))

    def _await_pin(self, version: int) -> None:
        begun = time.monotonic()
        while True:
            state = worst(read_reports(self.of.place)).get(version)
            if state is not None and state.state == "failing":
                raise EvaluationError(f"policy@{version} of {self.url} does not start: {state.reason}")
            if state is not None and state.state == "pinned" and self._card(version) is not None:
                return
            if time.monotonic() - begun > START_S:
                raise EvaluationError(f"policy@{version} of {self.url}: no answer within {START_S:.0f} s of its pin")
            time.sleep(LOOK_S)

    def _card(self, version: int) -> Mapping[str, Any] | None:
        return card(version, self.url, self.key)


def cards(url: str, key: str | None = None) -> list[dict[str, Any]]:
    """The models that an endpoint lists. EvaluationError when it does not."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=ANSWER_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EvaluationError(f"endpoint: {url} does not answer ({error})") from None
    if answer.status_code in (401, 403):
        raise EvaluationError(f"endpoint: {url} needs a key; put it into the environment as SAMPO_API_KEYS")
    try:
        found: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise EvaluationError(
            f"endpoint: {url}/v1/models lists no models (status {answer.status_code}); name a run's endpoint"
        ) from None
    return found


def card(version: int, url: str, key: str | None = None) -> Mapping[str, Any] | None:
    """What an endpoint says of a version that answers; None for one that does not."""
    return next((each["metadata"] for each in cards(url, key) if each["id"] == f"policy@{version}"), None)


def key_from_environment() -> str | None:
    """The first of SAMPO_API_KEYS."""
    return next(filter(None, os.environ.get("SAMPO_API_KEYS", "").split(",")), None)


def find_live(target: Target, endpoint: str | None) -> Live | None:
    """The endpoint of the run: the one named, or else one that its directory names and that answers for it. None where
    one has to be started. EvaluationError for a named endpoint that does not serve the run."""
    if target.run is None:
        if endpoint not in (None, NEW):
            raise EvaluationError(
                f"endpoint={endpoint}: a folder is served for the time of its evaluation; leave the endpoint out"
            )
        return None
    key = key_from_environment()
    if endpoint and endpoint != NEW:
        named = Live(target.run, endpoint.rstrip("/").removesuffix("/v1"), key)
        if not named.serves_run():
            raise EvaluationError(
                f"endpoint={endpoint}: it does not serve run {target.run.id} ({target.run.place.url})"
            )
        return named
    lives = (Live(target.run, url, key) for url in ([] if endpoint else read_addresses(target.run.place)))
    return next((live for live in lives if _answers(live.url) and live.serves_run()), None)


def _answers(url: str) -> bool:
    """Whether anything does: what was killed leaves its address."""
    try:
        return httpx.get(f"{url}/health", timeout=ANSWER_S, trust_env=False).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _change(run: Place, command: Command) -> None:
    """Changes what the run in that directory serves, as `sampo pin` does."""
    versions = run.at("versions").url
    infos = {each: read_info(version_folder(versions, each)) for each in complete_versions(versions)}
    id = new_id()
    edit_serving(run, lambda now: apply_once(now, infos, id, command))


@dataclass(frozen=True)
class Own:
    """An endpoint of a scratch run that has links to the target's versions; one engine goes from version to version."""

    of: Run
    url: str
    key: None = None
    request_s: float = OWN_REQUEST_S

    @property
    def run(self) -> str:
        return self.of.id

    @contextlib.contextmanager
    def serving(self, chosen: Chosen) -> Iterator[None]:
        version, begun = chosen.version or 0, time.monotonic()
        if read_serving(self.of.place).live != version:
            _change(self.of.place, Promote(str(version)))
        while (card(version, self.url) or {}).get("state") != "live":
            if time.monotonic() - begun > START_S:
                raise EvaluationError(f"policy@{version} has not become live within {START_S:.0f} s")
            time.sleep(LOOK_S)
        yield


@contextlib.contextmanager
def open_own(target: Target, context: int, cluster: Cluster, note: Callable[[str], None]) -> Iterator[Own]:
    """Starts an endpoint on a free loopback port, in the Ray that is connected; `context`: see `Subject`."""
    with scratch_folder() as folder:
        config = _served_config(target, folder, context)
        run = _scratch_run(target, folder, serving_plan(reopened(config), cluster).config)
        with open_live(run, note) as url:
            yield Own(run, url)


def _served_config(target: Target, folder: Path, context: int) -> RunConfig:
    """How the target is served: nobody else asks, so that there are no keys, no limits and no gates."""
    if target.run:
        config = target.run.config
    else:
        model = {"path": str(target.folder), "template": "tokenizer"}
        config = load_config(
            {"model": model, "data": {"train": str(folder / "none.jsonl")}, "run": {"dir": str(folder)}}
        )
    serve = ServeConfig(port=0, api_keys=(), request_timeout_s=OWN_REQUEST_S, start_timeout_s=600.0, follow="manual")
    data = config.data.model_copy(update={"max_length": context})
    named = config.run.model_copy(update={"dir": str(folder)})
    return config.model_copy(update={"serve": serve, "data": data, "run": named})


def _scratch_run(target: Target, folder: Path, config: RunConfig) -> Run:
    """A run directory with the versions that are asked for, the first of them live. A run's files are linked one by
    one, so that nothing here can remove or change what they lead to."""
    place, manifest = Place(str(folder)), target.run.manifest if target.run else Manifest(id="folder")
    place.at("config.yaml").write(dump_config(config).encode())
    ChatFormat.load(target.tokenizer, "tokenizer").save(folder / "tokenizer")
    run = Run(config, manifest, place)
    place.at("manifest.json").write(manifest.model_dump_json().encode())
    if target.run:
        infos, numbers = target.infos or {}, {0}
        for chosen in target.versions:
            adapters = infos[chosen.version or 0].adapters
            numbers |= {chosen.version or 0, *([adapters.base] if adapters else [])}
        for number in sorted(numbers):
            _link(target.run.versions.at(f"{number:06d}"), folder / "versions" / f"{number:06d}")
    else:
        assert target.folder is not None
        ray.get(_write_base.remote(str(target.folder), str(folder)), timeout=COPY_S)
    first = target.versions[0].version or 0
    _change(place, Promote(str(first)))
    return run


def _link(version: Place, folder: Path) -> None:
    if not version.local:
        version.download(folder)
        return
    folder.mkdir(parents=True)
    for file in sorted(Path(version.path).iterdir()):
        (folder / file.name).symlink_to(file)


@ray.remote(num_cpus=0.5, max_retries=1)
def _write_base(model_folder: str, run: str) -> None:
    """Version 0 of the run in `run`: the model in bf16, as replicas hold it."""
    model = load_model(model_folder)
    with scratch_folder() as shell:
        write_shell(model, ChatFormat.load(f"{run}/tokenizer", "tokenizer"), shell)
        info = VersionInfo(version=0, round=0, step=0, created=int(time.time()), base=Path(model_folder).name)
        write_version(f"{run}/versions/000000", saved_tensors(model), str(shell), info)
