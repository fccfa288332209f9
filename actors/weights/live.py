"""Which weights a store has in memory and what the live policy serves: serving.json is followed and edited."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from ray.exceptions import RayError

from sampo_ray.actors.weights.client import Weights
from sampo_ray.actors.weights.gate import Verdict, check
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.config.sections import ServeConfig
from sampo_ray.run import versions
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version
from sampo_ray.run.version_folders import VersionInfo, WeightsId, complete_versions, read_info, version_folder
from sampo_ray.run.versions import Serving

CHECK_TIMEOUT_S = 1800.0


class LoadedVersions:
    """The newest version of a run, the live one and the round's reference; any other is read from disk.

    `put` moves the bytes of a bucket that was read into the object store.
    """

    def __init__(self, run: str, versions_url: str, put: Callable[[Bucket], Bucket]) -> None:
        self.run, self.url, self._put = run, versions_url, put
        self.training: Weights | None = None
        self.live: Weights | None = None
        self.reference: Weights | None = None
        self._infos: dict[int, VersionInfo] = {}

    def current(self, channel: str) -> Weights | None:
        return self.live if channel == "live" else self.training

    def info(self, version: int) -> VersionInfo:
        """WeightsError for a version that is not complete on disk."""
        if version not in self._infos:
            self._infos[version] = read_info(version_folder(self.url, version))
        return self._infos[version]

    def on_disk(self) -> dict[int, VersionInfo]:
        return {version: self.info(version) for version in complete_versions(self.url)}

    def labels(self, serving: Serving, version: int) -> list[str]:
        return versions.all_labels(serving, {version: self.info(version)})[version]

    def get(self, version: int) -> Weights:
        """From memory if it is there, else from disk."""
        held = [w for w in (self.training, self.live, self.reference) if w and w.id.version == version]
        return held[0] if held else self._read(version)

    def is_newer(self, version: int) -> bool:
        return self.training is None or version > self.training.id.version

    def add(self, version: int, buckets: tuple[Bucket, ...]) -> None:
        """A durable version is now the newest."""
        self.training = self._of(version, buckets)

    def read_newest(self) -> int | None:
        """Reads the newest version on disk; None when there is none that is newer than the newest in memory."""
        newest = max(complete_versions(self.url), default=None)
        if newest is None or not self.is_newer(newest):
            return None
        self.training = self._read(newest)
        return newest

    def make_live(self, serving: Serving) -> None:
        wanted = serving.live, serving.sequence
        if serving.live is not None and (self.live is None or (self.live.id.version, self.live.sequence) != wanted):
            self.live = replace(self.get(serving.live), sequence=serving.sequence)

    def _read(self, version: int) -> Weights:
        buckets = read_version(version_folder(self.url, version))
        return self._of(version, tuple(self._put(bucket) for bucket in buckets))

    def _of(self, version: int, buckets: tuple[Bucket, ...]) -> Weights:
        """The weights of these buckets; of adapters, with the buckets of their base."""
        weights_id, info = WeightsId(self.run, version), self.info(version)
        if info.adapters is None:
            return Weights(weights_id, info, buckets, version)
        (adapters,) = buckets
        base = self.get(info.adapters.base)
        if self.reference is None or self.reference.id.version < base.id.version:
            self.reference = base  # the next version needs it again
        return Weights(weights_id, info, base.buckets, version, adapters)


class LongPoll:
    """Wakes readers when the weights of a channel change."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def wait(
        self, current: Callable[[], Weights | None], known: WeightsId | None, sequence: int | None, timeout_s: float
    ) -> Weights | None:
        """The current weights once they are not `known`, or their sequence is not this one; None after `timeout_s`."""

        def differs() -> bool:
            now = current()
            return now is not None and (now.id != known or sequence not in (None, now.sequence))

        async with self._changed:
            if not differs():  # wait_for with a time-out of 0 would not evaluate the condition
                try:
                    await asyncio.wait_for(self._changed.wait_for(differs), timeout_s)
                except TimeoutError:
                    return None
            return current()


class LivePolicy:
    """Follows and edits a run's serving.json. Coroutines are called with `lock` held; the task of a check takes it."""

    def __init__(self, loaded: LoadedVersions, poll: LongPoll, pinned: PinnedApps, lock: asyncio.Lock) -> None:
        self._loaded, self._poll, self._pinned, self._lock = loaded, poll, pinned, lock
        self.place = Place(loaded.url.rstrip("/").rsplit("/", 1)[0])
        self.serving = Serving()
        self._config = ServeConfig(api_keys=())
        self._check: asyncio.Task[None] | None = None

    @property
    def is_steady(self) -> bool:
        """Whether each version goes live as soon as it is published."""
        return self.serving.follow == "latest" and not self.serving.held and not self._config.gates.any

    def recover(self) -> None:
        """Reads the run directory: its settings, its newest version and what is live."""
        self._config = versions.read_serve_config(self.place)
        self._loaded.read_newest()
        labels = {version: self._loaded.labels(self.serving, version) for version in self._loaded.on_disk()}
        if labels:
            self.serving = versions.edit_serving(
                self.place, lambda state: versions.resume(state, labels, self._config.gates.any), self._config.follow
            )
            self._loaded.make_live(self.serving)

    async def consider(self, version: int) -> None:
        """Announces the newest version; it goes live if it is followed, after its checks if there are any."""
        await self._poll.announce()
        if self._config.gates.any and self._pinned.apps and version:
            if self._check is None or self._check.done():  # else the newest is considered when that check ends
                self._check = asyncio.create_task(self._check_version(version))
        else:
            labels = self._loaded.labels(self.serving, version)
            await self.edit(lambda state: versions.accept(state, version, labels))

    async def edit(self, change: Callable[[Serving], Serving]) -> None:
        self.serving = await asyncio.to_thread(versions.edit_serving, self.place, change, self._config.follow)
        await self.carry_out()

    async def look(self, watch: bool) -> None:
        """Follows changes of serving.json and, with `watch`, versions that another process has published."""
        now = await asyncio.to_thread(versions.read_serving, self.place, self._config.follow)
        if now != self.serving:
            self.serving = now
            await self.carry_out()
        newest = await asyncio.to_thread(self._loaded.read_newest) if watch else None
        if newest is not None and not self._config.gates.any:  # the process that trains the run makes the checks
            await self.consider(newest)

    async def carry_out(self) -> None:
        """Loads the live version, wakes the readers, and serves what is pinned."""
        await asyncio.to_thread(self._loaded.make_live, self.serving)
        await self._poll.announce()
        await asyncio.to_thread(self._pinned.serve, self.place, self._loaded.run, self.serving)

    def close(self) -> None:
        """Ends a check under way: another run is attached."""
        if self._check:
            self._check.cancel()

    async def _check_version(self, version: int) -> None:
        labels = self._loaded.labels(self.serving, version)
        before = max((v for v in self.serving.passed if v < version), default=None)
        call = check.remote(self._pinned.apps, self.place, self._loaded.run, version, before)
        try:
            verdict: Verdict | None = await asyncio.wait_for(call, CHECK_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            cause = getattr(error, "cause", None) or error
            verdict = Verdict(False, f"its checks could not be made: {type(cause).__name__}: {cause}"[:300])
        async with self._lock:
            if verdict is not None and verdict.passed:
                await self.edit(lambda state: versions.accept(state, version, labels))
            elif verdict is not None:
                reason = verdict.reason
                await self.edit(lambda state: versions.refuse(state, version, reason))
            self._check = None
            newest = self._loaded.training
            if newest is not None and newest.id.version != version:
                await self.consider(newest.id.version)
