"""The weight store: an actor that hands out a run's weights and decides which of its versions is live."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping

import ray
from pydantic import BaseModel, ConfigDict
from ray.actor import ActorHandle

from sampo_ray.actors.nodes import ANYWHERE, Where
from sampo_ray.actors.transfer.coordinator import ReceivingReplica, TransferCoordinator, TransferGroup, TransferPlan
from sampo_ray.actors.weights.client import NAMESPACE, Channel, CommandAnswer, StoreState, Weights, put, throttle
from sampo_ray.actors.weights.duty import Duty
from sampo_ray.actors.weights.live import LivePolicy
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.actors.weights.turns import SharedGpus, Turn
from sampo_ray.errors import WeightsError
from sampo_ray.run import serving
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.commands import Command
from sampo_ray.run.report import REFRESH_S, PinName, PinState, Report, Trouble, report_place
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId

logger = logging.getLogger(__name__)

LOOK_S = 1.0
READY_S = 10.0
AMPLE_CORES = 10
STORE_CPUS = 0.1
NO_TURN = "it does not answer while the ranks train on its GPUs (fleet.placement=shared)"


class Attachment(BaseModel):
    """The run that a store works for, as its state file says it; `watch`: another process trains the run."""

    model_config = ConfigDict(frozen=True)

    run: str = ""
    versions: str = ""
    watch: bool = False
    gpus: Turn = "engines"
    """Whose turn it is on GPUs that engines and training ranks share by time."""


class WeightStore:
    """Ray actor (async, detached) that holds a run's weights in the object store and follows its `serving.json`.

    It reads them from the run directory, since objects die with the process that put them: the newest version and the
    live one, with adapters their base, are there, and no third. `state_url`
    is a small file (local path or fsspec URL) that names the attached run, so that a restarted actor returns to it.
    `apps` is the prefix of the fleet's Serve applications ("": no fleet, so no checks and no pins). Methods are
    idempotent: the actor is started with unlimited retries. What is wanted of it is brought about in duties, which try
    again until they succeed; their trouble is in the state, and in a report for those who cannot ask.
    """

    def __init__(self, state_url: str, apps: str = "") -> None:
        self._file = Place(state_url)
        self._pinned, self._poll = PinnedApps(apps), LongPoll()
        self._publishing, self._lock = asyncio.Lock(), asyncio.Lock()  # edits do not wait for weights to be copied
        self._transfers = TransferCoordinator(self._current_id)
        self._reporting, self._reported = Duty("the report of this store", self._report, LOOK_S), Report(at=0.0)
        self._attached = Attachment.model_validate_json(self._file.read()) if self._file.exists() else Attachment()
        self._gpus = SharedGpus(self._attached.gpus)
        self._loaded, self._policy = self._opened()

    async def attach(self, run_id: str, versions_url: str, watch: bool = False) -> WeightsId | None:
        """Works for this run from now on, beginning with its versions on disk; returns what is live (None: nothing).
        With `watch` another process trains the run, and new versions are looked for on disk. Raises what stands against
        it: a serving.json or version that cannot be read."""
        async with self._publishing, self._lock:
            before, self._attached = self._attached, Attachment(run=run_id, versions=versions_url, watch=watch)
            await self._gpus.give("engines", 0)  # the ranks of a driver before this one have ended
            if before.model_copy(update={"gpus": "engines"}) != self._attached:
                self._policy.close()
                self._reported = Report(at=0.0)
                self._loaded, self._policy = self._opened()
            await self._remember()
            await self._policy.recover()
        await self._ready()
        return self._current_id("live")

    async def publish(self, run_id: str, version: int) -> WeightsId | None:
        """Reads the newest version on disk, which is this one or was made since; returns what is live afterwards.

        It goes live at once if the live policy follows such versions and the recipe names no checks, else after its
        checks; where serving.json cannot be changed just now, as soon as it can be. Idempotent; a version older than
        the newest is ignored. Raises WeightsError for a run that is not attached or a version that is not complete on
        disk, or is damaged.
        """
        async with self._publishing:
            self._check_run(run_id)
            self._start()
            await asyncio.to_thread(self._loaded.info, version)
            await self._policy.publish()
            newest = self._loaded.newest
            if newest is not None and version < newest:
                logger.warning("ignored version %d of run %s: %d is newer", version, run_id, newest)
            return self._current_id("live")

    async def wait(
        self, known: WeightsId | None, timeout_s: float, channel: Channel = "live", sequence: int | None = None
    ) -> Weights | None:
        """Long poll: a channel's weights once they are not `known` (or their sequence is another); None on time-out."""
        self._start()
        return await self._poll.wait(lambda: self._loaded.current(channel), known, sequence, timeout_s)

    async def give_gpus(self, turn: Turn, timeout_s: float) -> bool:
        """Gives GPUs that are shared by time to the engines or to the training ranks. Returns whether these have them
        within `timeout_s`: for ranks, whether no engine uses them any more. A store that restarts knows it again."""
        async with self._lock:
            if turn != self._attached.gpus:
                self._attached = self._attached.model_copy(update={"gpus": turn})
                await self._remember()
        return await self._gpus.give(turn, timeout_s)

    async def gpu_turn(self, replica: str, sleeps: bool, timeout_s: float) -> Turn:
        """Whose turn it is, for a replica whose engine `sleeps` or not; see `GpuTurns.ask`. Waits for up to `timeout_s`
        as long as it has nothing to change."""
        return await self._gpus.ask(replica, sleeps, timeout_s)

    # Sending a version by a transport: the calls of its TransferCoordinator. A store that restarts has a new one.
    async def offer_transfer(self, weights: WeightsId) -> None:
        await self._transfers.offer(weights)

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

    async def serves(self, version: int | None) -> bool:
        """Whether this version is live (None: any), and each version goes live as soon as it is published."""
        await self._ready()
        return self._policy.is_steady and version in (None, self._policy.serving.live)

    async def checked(self, timeout_s: float) -> bool:
        """Whether the newest version was accepted or refused, if it is to be checked. Waits up to `timeout_s`."""
        await self._ready()
        return await self._policy.checked(timeout_s)

    async def place(self) -> str:
        """URL of the attached run's directory ("": none is attached)."""
        return self._policy.place.url

    async def state(self) -> StoreState:
        await self._ready()
        state, pins = self._policy.serving, self._pins()
        entries = serving.listing(state, await asyncio.to_thread(self._loaded.on_disk), pins)
        live = self._loaded.live.sequence if self._loaded.live else None
        about = self._attached.run, self._pinned.apps
        return StoreState(*about, state, entries, pins, self._troubles(), live, self._gpus.turn)

    async def command(self, command: Command, id: str) -> CommandAnswer:
        """Carries out an operator's command, unless that of this id has been carried out; VersionError when it cannot
        be. Returns once readers get what is live then, or after some time."""
        await self._ready()
        async with self._lock:
            on_disk = await asyncio.to_thread(self._loaded.on_disk)
            done, repeated = await self._policy.command(id, command, on_disk)
        await self._policy.loaded()
        return CommandAnswer(done, repeated, await self.state())

    def _opened(self) -> tuple[LoadedVersions, LivePolicy]:
        loaded = LoadedVersions(self._attached.run, self._attached.versions, kept)
        return loaded, LivePolicy(loaded, self._poll, self._pinned, self._lock, self._attached.watch)

    def _current_id(self, channel: str) -> WeightsId | None:
        now = self._loaded.current(channel)
        return now.id if now else None

    async def _remember(self) -> None:
        await asyncio.to_thread(self._file.write, self._attached.model_dump_json().encode())

    def _check_run(self, run_id: str) -> None:
        if run_id != self._attached.run:
            raise WeightsError(f"run {run_id!r} is not attached (attached: {self._attached.run!r}); call attach first")

    def _start(self) -> None:
        """Begins to follow the run directory, which other processes change as well, and to do what it says."""
        if self._attached.run:
            self._policy.start()
            self._pinned.duty.start()
            self._reporting.start()

    async def _ready(self) -> None:
        """Waits for what is served to be known."""
        self._start()
        if self._attached.run:
            await self._policy.ready(READY_S)

    def _pins(self) -> Mapping[PinName, PinState]:
        """How far pinned versions are, and why they do not answer in the ranks' turn."""
        states = self._pinned.states
        if self._gpus.turn == "engines":
            return states
        return {name: each.model_copy(update={"reason": each.reason or NO_TURN}) for name, each in states.items()}

    def _troubles(self) -> tuple[Trouble, ...]:
        others = (duty.trouble for duty in (self._pinned.duty, self._reporting))
        return (*self._policy.troubles, *(trouble for trouble in others if trouble is not None))

    async def _report(self) -> bool:
        """Writes the report if it says something new, and again from time to time while something is wrong."""
        now = Report(at=time.time(), pins=self._pins(), troubles=self._troubles())
        again = not now.is_content and now.at - self._reported.at > REFRESH_S
        if self._pinned.apps and (again or not now.says_the_same(self._reported)):
            place = report_place(self._policy.place, self._pinned.apps)
            await asyncio.to_thread(place.write, now.model_dump_json(indent=1).encode())
            self._reported = now
        return True


def kept(bucket: Bucket) -> Bucket:
    """The bucket in the object store. Ray copies in six threads: where cores are few, a pause follows."""
    begun = time.perf_counter()
    put_there = put(bucket)
    throttle(begun, min(1.0, (os.cpu_count() or 1) / AMPLE_CORES))
    return put_there


def start_weight_store(name: str, state_url: str, apps: str = "", where: Where = ANYWHERE) -> ActorHandle:
    """The store of that name (in namespace "sampo"), started if it does not run yet. It outlives the driver and, where
    others have room, its node."""
    asked = {"num_cpus": STORE_CPUS, **where.lasting_options}
    options = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, **asked}
    actor = ray.remote(WeightStore).options(name=name, namespace=NAMESPACE, get_if_exists=True, **options)
    return actor.remote(state_url, apps)
