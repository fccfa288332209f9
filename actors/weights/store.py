"""The weight store: a run's newest weights for its fleet, and which of its versions the live policy serves.

It hands out two channels. `training` is the newest published version, which rollouts are drawn from; `live` is what
`serving.json` says (`sampo_ray/run/versions.py`), which the endpoint answers with. Mostly they are the same bytes.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import fsspec
import ray
import torch
from pydantic import ValidationError
from ray.actor import ActorHandle
from ray.exceptions import RayError

from sampo_ray.actors.transfer.roll import Roll
from sampo_ray.actors.transfer.sending import Sender
from sampo_ray.actors.weights.gate import Verdict, check
from sampo_ray.actors.weights.handout import Weights, put, rest
from sampo_ray.actors.weights.pinned import Pinned, adapter_ranks
from sampo_ray.config.model import LoraConfig
from sampo_ray.config.serve import ServeConfig
from sampo_ray.errors import WeightsError
from sampo_ray.run import versions
from sampo_ray.run.adapter_files import write_adapters
from sampo_ray.run.buckets import Bucket, verify
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version, write_version
from sampo_ray.run.version_folders import VersionInfo, WeightsId, complete_versions, read_info, version_folder
from sampo_ray.run.versions import Serving, read_serve_config

logger = logging.getLogger(__name__)

NAMESPACE = "sampo"
LOOK_S = 1.0
AMPLE_CORES = 10
CHECK_TIMEOUT_S = 1800.0
Channel = Literal["live", "training"]


@dataclass(frozen=True)
class NewVersion:
    """A version to publish: its run, the run's folder of versions, and its version.json."""

    run: str
    versions: Place
    info: VersionInfo
    reference: bool = False
    """A round begins with it."""

    @property
    def folder(self) -> str:
        return version_folder(self.versions.url, self.info.version)


class WeightStore:
    """Ray actor (async, detached) that holds a run's weights in the object store and follows its `serving.json`.

    The bytes are put again under this actor's ownership, since objects die with the process that put them. `state_url`
    is a small file (local path or fsspec URL) that remembers the attached run, so that a restarted actor comes back to
    it by itself. `apps` is the prefix of the fleet's Serve applications ("": no fleet, so no checks and no pins).
    Methods are idempotent: the actor is started with unlimited retries.
    """

    def __init__(self, state_url: str, apps: str = "") -> None:
        self._fs, self._state = fsspec.core.url_to_fs(state_url)
        self._apps = apps
        self._run, self._versions, self._watch = "", "", False
        self._config = ServeConfig(api_keys=())
        self._serving = Serving()
        self._training: Weights | None = None
        self._live: Weights | None = None
        self._reference: Weights | None = None
        self._infos: dict[int, VersionInfo] = {}
        self._pinned = Pinned(apps)
        self._roll = Roll(self._current_id)
        self._lock = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        if self._fs.exists(self._state):
            state = json.loads(self._fs.cat_file(self._state))
            self._run, self._versions, self._watch = state["run"], state["versions"], state.get("watch", False)
            self._recover()

    async def attach(self, run_id: str, versions_url: str, watch: bool = False) -> WeightsId | None:
        """Works for this run from now on, beginning with its versions on disk; returns what is live (None: nothing).

        With `watch` the run is trained elsewhere, and new versions are looked for on disk.
        """
        async with self._lock:
            if run_id != self._run:
                self._training = self._live = self._reference = None
                self._serving, self._infos = Serving(), {}
            self._run, self._versions, self._watch = run_id, versions_url, watch
            state = {"run": run_id, "versions": versions_url, "watch": watch}
            await asyncio.to_thread(self._remember, state)
            await asyncio.to_thread(self._recover)
            await self._notify()
            await asyncio.to_thread(self._pinned.become, self._place, self._run, adapter_ranks(self._serving))
        self._attend()
        return self._live.id if self._live else None

    async def publish(
        self, run_id: str, version: int, reference: bool, buckets: Sequence[Bucket], offered: bool = False
    ) -> WeightsId | None:
        """Makes a durable version the newest, and the round's reference if so marked; returns what is live afterwards.

        It goes live at once if the live policy follows such versions and the recipe names no checks; else when it has
        passed them. Idempotent; a version older than the newest is ignored. `offered`: the publisher also sends it by a
        transport. Raises WeightsError for a run that is not attached or a version that is not complete on disk.
        """
        async with self._lock:
            self._check_run(run_id)
            if self._training is None or version > self._training.id.version:
                owned = tuple([await self._own(bucket) for bucket in buckets])
                if offered:
                    await self._roll.offer(WeightsId(run_id, version))
                self._training = await asyncio.to_thread(self._weights, version, owned)
                await self._consider(version)
            elif version < self._training.id.version:
                logger.warning("ignored version %d of run %s: %s is newer", version, run_id, self._training.id)
            if reference and self._training and self._training.id.version == version:
                self._reference = self._training
            return self._live.id if self._live else None

    async def wait(
        self, known: WeightsId | None, timeout_s: float, channel: Channel = "live", sequence: int | None = None
    ) -> Weights | None:
        """Long poll: a channel's weights once they are not `known` (or their sequence is another); None on time-out."""
        self._attend()

        def differs() -> bool:
            now = self._current(channel)
            return now is not None and (now.id != known or sequence not in (None, now.sequence))

        async with self._changed:
            if not differs():  # asked first: a wait of 0 s would not even look
                try:
                    await asyncio.wait_for(self._changed.wait_for(differs), timeout_s)
                except TimeoutError:
                    return None
            return self._current(channel)

    async def roll(self, step: Literal["enlist", "muster", "call", "report", "close"], *arguments: Any) -> Any:
        """A step of sending a version by a transport; see `Roll`. A store that restarts begins with an empty one."""
        return await getattr(self._roll, step)(*arguments)

    async def get(self, run_id: str, version: int) -> Weights:
        """A version of the attached run: from memory when it is held, else from disk."""
        self._check_run(run_id)
        return await asyncio.to_thread(self._held_or_loaded, version)

    async def serves(self, version: int | None) -> bool:
        """Whether the live policy serves this version (None: the newest), and goes on to serve what is published."""
        state = self._serving
        steady = state.follow == "latest" and not state.held and not self._config.gates.any
        return steady and version in (None, state.live)

    async def place(self) -> str:
        """URL of the attached run's directory ("": none is attached)."""
        return self._place.url if self._versions else ""

    async def state(self) -> dict[str, Any]:
        """What is served and what there is: `run`, `apps` (prefix of the fleet's applications), `serving` (a Serving)
        and `versions` (see versions.catalogue).
        """
        infos = await asyncio.to_thread(self._all_infos)
        listed = versions.catalogue(self._serving, infos)
        return {"run": self._run, "apps": self._apps, "serving": self._serving, "versions": listed}

    async def command(self, verb: str, name: str, argument: str = "") -> dict[str, Any]:
        """Promotes, rolls back, pins, unpins or labels, and returns the new state. VersionError says what is wrong."""
        async with self._lock:
            infos = await asyncio.to_thread(self._all_infos)
            await self._edit(lambda state: versions.commanded(state, infos, verb, name, argument))
        return await self.state()

    def _current(self, channel: str) -> Weights | None:
        return self._live if channel == "live" else self._training

    def _current_id(self, channel: str) -> WeightsId | None:
        now = self._current(channel)
        return now.id if now else None

    @property
    def _place(self) -> Place:
        return Place(self._versions.rstrip("/").rsplit("/", 1)[0])

    def _recover(self) -> None:
        """Takes up what the run directory holds: its settings, its newest version, and what is to be live."""
        numbers = complete_versions(self._versions)
        self._config = read_serve_config(self._place)
        if numbers and (self._training is None or numbers[-1] > self._training.id.version):
            self._training = self._load(numbers[-1])

        labels = {version: self._labels(version) for version in numbers}

        def settled(state: Serving) -> Serving:
            return versions.settled(state, labels, self._config.gates.any)

        if numbers:
            self._serving = versions.edit_serving(self._place, settled, self._config.follow)
            self._go_live()

    async def _consider(self, version: int) -> None:
        """A newest version: known to those who follow training; to its checks, if there are any, and live."""
        await self._notify()
        if self._config.gates.any and self._apps and version:
            if "check" in self._tasks and not self._tasks["check"].done():
                return  # when that one is decided, the newest is looked at
            self._tasks["check"] = asyncio.create_task(self._decide(version))
        else:
            labels = self._labels(version)
            await self._edit(lambda state: versions.passed(state, version, labels))

    async def _decide(self, version: int) -> None:
        run, labels = self._run, self._labels(version)
        before = max((v for v in self._serving.passed if v < version), default=None)
        try:
            verdict: Verdict | None = await asyncio.wait_for(
                check.remote(self._apps, self._place, run, version, before), CHECK_TIMEOUT_S
            )
        except (RayError, TimeoutError) as error:
            cause = getattr(error, "cause", None) or error
            verdict = Verdict(False, f"its checks could not be made: {type(cause).__name__}: {cause}"[:300])
        async with self._lock:
            if run != self._run:
                return
            if verdict is not None:
                found = verdict
                await self._edit(
                    lambda state: (
                        versions.passed(state, version, labels)
                        if found.passed
                        else versions.refused(state, version, found.reason)
                    )
                )
            newest = self._training.id.version if self._training else version
            del self._tasks["check"]
            if newest != version:
                await self._consider(newest)

    async def _edit(self, change: Callable[[Serving], Serving]) -> None:
        self._serving = await asyncio.to_thread(versions.edit_serving, self._place, change, self._config.follow)
        await self._follow()

    async def _follow(self) -> None:
        """Makes what serving.json says so."""
        await asyncio.to_thread(self._go_live)
        await self._notify()
        await asyncio.to_thread(self._pinned.become, self._place, self._run, adapter_ranks(self._serving))

    def _go_live(self) -> None:
        wanted, sequence = self._serving.live, self._serving.sequence
        if wanted is None or (self._live and (self._live.id.version, self._live.sequence) == (wanted, sequence)):
            return
        self._live = replace(self._held_or_loaded(wanted), sequence=sequence)

    def _attend(self) -> None:
        """Sees to it that somebody follows serving.json, which others change as well."""
        if self._run and ("look" not in self._tasks or self._tasks["look"].done()):
            self._tasks["look"] = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                async with self._lock:
                    now = await asyncio.to_thread(versions.read_serving, self._place, self._config.follow)
                    if now != self._serving:
                        self._serving = now
                        await self._follow()
                    if self._watch:
                        await self._look_for_versions()
            except (OSError, ValidationError, WeightsError, RayError) as error:
                logger.warning("could not follow the run directory, and will look again: %s", type(error).__name__)

    async def _look_for_versions(self) -> None:
        numbers = await asyncio.to_thread(complete_versions, self._versions)
        if numbers and (self._training is None or numbers[-1] > self._training.id.version):
            self._training = await asyncio.to_thread(self._load, numbers[-1])
            # Whoever trains the run has checks of its own and writes their verdict; without them we are the first.
            if not self._config.gates.any:
                await self._consider(numbers[-1])

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _remember(self, state: dict[str, Any]) -> None:
        self._fs.makedirs(self._fs._parent(self._state), exist_ok=True)
        self._fs.pipe_file(f"{self._state}.new", json.dumps(state).encode())
        self._fs.mv(f"{self._state}.new", self._state)

    def _check_run(self, run_id: str) -> None:
        if run_id != self._run:
            raise WeightsError(f"run {run_id!r} is not attached (attached: {self._run!r}); call attach first")

    def _info(self, version: int) -> VersionInfo:
        if version not in self._infos:
            self._infos[version] = read_info(version_folder(self._versions, version))
        return self._infos[version]

    def _all_infos(self) -> dict[int, VersionInfo]:
        return {version: self._info(version) for version in complete_versions(self._versions)}

    def _labels(self, version: int) -> list[str]:
        return versions.all_labels(self._serving, {version: self._info(version)})[version]

    async def _own(self, bucket: Bucket) -> Bucket:
        here = replace(bucket, data=await bucket.data)
        return await asyncio.to_thread(own, here)

    def _held_or_loaded(self, version: int) -> Weights:
        held = [w for w in (self._training, self._live, self._reference) if w and w.id.version == version]
        return held[0] if held else self._load(version)

    def _load(self, version: int) -> Weights:
        buckets = tuple(put(bucket) for bucket in read_version(version_folder(self._versions, version)))
        return self._weights(version, buckets)

    def _weights(self, version: int, buckets: tuple[Bucket, ...]) -> Weights:
        """A version of these buckets, or of that with adapters and the buckets of the version they belong to."""
        weights_id, info = WeightsId(self._run, version), self._info(version)
        if info.adapters is None:
            return Weights(weights_id, info, buckets, version)
        (adapters,) = buckets
        base = self._held_or_loaded(info.adapters.base)
        if self._reference is None or self._reference.id.version < base.id.version:
            self._reference = base  # the next version asks for it again
        return Weights(weights_id, info, base.buckets, version, adapters)


def own(bucket: Bucket) -> Bucket:
    """A verified copy of this process's. Ray copies in six threads, so where cores are few it rests afterwards."""
    begun = time.perf_counter()
    verify(bucket)
    copy = put(bucket)
    rest(begun, min(1.0, (os.cpu_count() or 1) / AMPLE_CORES))
    return copy


def start_weight_store(name: str, state_url: str, apps: str = "") -> ActorHandle:
    """The store of that name (in namespace "sampo"), started if it does not run yet. It outlives the driver."""
    options = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0.1}
    actor = ray.remote(WeightStore).options(name=name, namespace=NAMESPACE, get_if_exists=True, **options)
    return actor.remote(state_url, apps)


def find_weight_store(name: str) -> ActorHandle:
    """The running store of that name; ValueError (Ray's) when there is none."""
    return ray.get_actor(name, namespace=NAMESPACE)


def publish_version(
    store: ActorHandle,
    new: NewVersion,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shell_folder: str,
    timeout_s: float = 300.0,
    sender: Sender | None = None,
) -> WeightsId | None:
    """Makes a version durable, then known: streams `tensors` to disk and object store, then tells the store.

    A `sender` then sends it by a transport while this process goes on. Returns the id that is live afterwards.
    """
    buckets = write_version(new.folder, tensors, shell_folder, new.info, keep=put)
    offered = sender is not None and sender.free
    call = store.publish.remote(new.run, new.info.version, new.reference, buckets, offered)
    live = ray.get(call, timeout=timeout_s)
    if sender is not None and offered:
        sender.send(WeightsId(new.run, new.info.version), buckets)
    return live


def publish_adapters(
    store: ActorHandle,
    new: NewVersion,
    weights: Iterable[tuple[str, Sequence[torch.Tensor]]],
    config: LoraConfig,
    timeout_s: float = 300.0,
) -> WeightsId | None:
    """Publishes adapters alone (`write_adapters`); they are small, and replicas fetch them from the object store."""
    bucket = write_adapters(new.folder, weights, config, new.info, put)
    call = store.publish.remote(new.run, new.info.version, new.reference, [bucket])
    return ray.get(call, timeout=timeout_s)
