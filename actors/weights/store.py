"""The weight store: an actor that hands out a run's weights and decides which of its versions is live."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import ray
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.actor import ActorHandle
from ray.exceptions import RayError

from sampo_ray.actors.transfer.coordinator import ReceivingReplica, TransferCoordinator, TransferGroup, TransferPlan
from sampo_ray.actors.weights.client import NAMESPACE, Channel, StoreState, Weights, put, throttle
from sampo_ray.actors.weights.live import LivePolicy
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.errors import WeightsError
from sampo_ray.run import commands, serving
from sampo_ray.run.buckets import Bucket, verify
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId

logger = logging.getLogger(__name__)

LOOK_S = 1.0
AMPLE_CORES = 10


class Attachment(BaseModel):
    """The run that a store works for, as its state file says it; `watch`: another process trains the run."""

    model_config = ConfigDict(frozen=True)

    run: str = ""
    versions: str = ""
    watch: bool = False


class WeightStore:
    """Ray actor (async, detached) that holds a run's weights in the object store and follows its `serving.json`.

    The bytes are put again under this actor's ownership, since objects die with the process that put them. `state_url`
    is a small file (local path or fsspec URL) that names the attached run, so that a restarted actor returns to it.
    `apps` is the prefix of the fleet's Serve applications ("": no fleet, so no checks and no pins). Methods are
    idempotent: the actor is started with unlimited retries.
    """

    def __init__(self, state_url: str, apps: str = "") -> None:
        self._file = Place(state_url)
        self._pinned, self._poll, self._lock = PinnedApps(apps), LongPoll(), asyncio.Lock()
        self._transfers = TransferCoordinator(self._current_id)
        self._looking: asyncio.Task[None] | None = None
        self._attached = Attachment.model_validate_json(self._file.read()) if self._file.exists() else Attachment()
        self._loaded, self._policy = self._opened()
        if self._attached.run:
            self._policy.recover()

    async def attach(self, run_id: str, versions_url: str, watch: bool = False) -> WeightsId | None:
        """Works for this run from now on, beginning with its versions on disk; returns what is live (None: nothing).
        With `watch` another process trains the run, and new versions are looked for on disk."""
        async with self._lock:
            before, self._attached = self._attached, Attachment(run=run_id, versions=versions_url, watch=watch)
            if (before.run, before.versions) != (run_id, versions_url):
                self._policy.close()
                self._loaded, self._policy = self._opened()
            await asyncio.to_thread(self._file.write, self._attached.model_dump_json().encode())
            await asyncio.to_thread(self._policy.recover)
            await self._policy.carry_out()
        self._look()
        return self._current_id("live")

    async def publish(
        self, run_id: str, version: int, reference: bool, buckets: Sequence[Bucket], offered: bool = False
    ) -> WeightsId | None:
        """Makes a durable version the newest, and the round's reference if so marked; returns what is live afterwards.

        It goes live at once if the live policy follows such versions and the recipe names no checks, else after its
        checks. Idempotent; a version older than the newest is ignored. `offered`: the publisher also sends it by a
        transport. Raises WeightsError for a run that is not attached or a version that is not complete on disk.
        """
        async with self._lock:
            self._check_run(run_id)
            if self._loaded.is_newer(version):
                here = tuple([await asyncio.to_thread(copied, replace(b, data=await b.data)) for b in buckets])
                if offered:
                    await self._transfers.offer(WeightsId(run_id, version))
                await asyncio.to_thread(self._loaded.add, version, here)
                await self._policy.consider(version)
            newest = self._loaded.training
            if newest is not None and version < newest.id.version:
                logger.warning("ignored version %d of run %s: %s is newer", version, run_id, newest.id)
            elif reference:
                self._loaded.reference = newest
            return self._current_id("live")

    async def wait(
        self, known: WeightsId | None, timeout_s: float, channel: Channel = "live", sequence: int | None = None
    ) -> Weights | None:
        """Long poll: a channel's weights once they are not `known` (or their sequence is another); None on time-out."""
        self._look()
        return await self._poll.wait(lambda: self._loaded.current(channel), known, sequence, timeout_s)

    # Sending a version by a transport: the calls of its TransferCoordinator. A store that restarts has a new one.
    async def join_transfer(
        self, replica: ReceivingReplica, weights: WeightsId, timeout_s: float
    ) -> TransferPlan | None:
        return await self._transfers.join(replica, weights, timeout_s)

    async def gather_receivers(self, weights: WeightsId, timeout_s: float) -> TransferGroup | None:
        return await self._transfers.gather(weights, timeout_s)

    async def start_transfer(self, weights: WeightsId, limit_s: float, details: object) -> None:
        await self._transfers.start(weights, limit_s, details)

    async def report_transfer(self, replica: str, succeeded: bool) -> None:
        await self._transfers.report(replica, succeeded)

    async def finish_transfer(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]:
        return await self._transfers.finish(weights, timeout_s, succeeded)

    async def get(self, run_id: str, version: int) -> Weights:
        """A version of the attached run: from memory if it is there, else from disk."""
        self._check_run(run_id)
        return await asyncio.to_thread(self._loaded.get, version)

    async def serves(self, version: int | None) -> bool:
        """Whether this version is live (None: any), and each version goes live as soon as it is published."""
        return self._policy.is_steady and version in (None, self._policy.serving.live)

    async def place(self) -> str:
        """URL of the attached run's directory ("": none is attached)."""
        return self._policy.place.url

    async def state(self) -> StoreState:
        state, on_disk = self._policy.serving, await asyncio.to_thread(self._loaded.on_disk)
        return StoreState(self._attached.run, self._pinned.apps, state, serving.listing(state, on_disk))

    async def command(self, command: commands.Command) -> StoreState:
        """Carries out an operator's command and returns the new state; VersionError when it cannot be carried out."""
        async with self._lock:
            on_disk = await asyncio.to_thread(self._loaded.on_disk)
            await self._policy.edit(lambda state: commands.apply(state, on_disk, command))
        return await self.state()

    def _opened(self) -> tuple[LoadedVersions, LivePolicy]:
        loaded = LoadedVersions(self._attached.run, self._attached.versions, put)
        return loaded, LivePolicy(loaded, self._poll, self._pinned, self._lock)

    def _current_id(self, channel: str) -> WeightsId | None:
        now = self._loaded.current(channel)
        return now.id if now else None

    def _check_run(self, run_id: str) -> None:
        if run_id != self._attached.run:
            raise WeightsError(f"run {run_id!r} is not attached (attached: {self._attached.run!r}); call attach first")

    def _look(self) -> None:
        """Starts to follow the run directory, which other processes change as well, unless that is under way."""
        if self._attached.run and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                async with self._lock:
                    await self._policy.look(self._attached.watch)
            except (OSError, ValidationError, WeightsError, RayError) as error:
                logger.warning("could not read the run directory, and will try again: %s", type(error).__name__)


def copied(bucket: Bucket) -> Bucket:
    """A verified copy that this process owns. Ray copies in six threads: where cores are few, a pause follows."""
    begun = time.perf_counter()
    verify(bucket)
    copy = put(bucket)
    throttle(begun, min(1.0, (os.cpu_count() or 1) / AMPLE_CORES))
    return copy


def start_weight_store(name: str, state_url: str, apps: str = "") -> ActorHandle:
    """The store of that name (in namespace "sampo"), started if it does not run yet. It outlives the driver."""
    options = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0.1}
    actor = ray.remote(WeightStore).options(name=name, namespace=NAMESPACE, get_if_exists=True, **options)
    return actor.remote(state_url, apps)
