"""What the live policy serves: serving.json is followed and edited, and versions are checked before they go live."""

import asyncio
from collections.abc import Callable

from ray.exceptions import RayError

from sampo_ray.actors.weights.gates import Verdict, check
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.config.serving import ServeConfig
from sampo_ray.run import serving
from sampo_ray.run.serving import Serving
from sampo_ray.run.storage import Place

CHECK_TIMEOUT_S = 1800.0


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
        self._config = serving.read_serve_config(self.place)
        self._loaded.read_newest()
        labels = {version: self._loaded.labels(self.serving, version) for version in self._loaded.on_disk()}
        if labels:
            self.serving = serving.edit_serving(
                self.place, lambda state: serving.resume(state, labels, self._config.gates.any), self._config.follow
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
            await self.edit(lambda state: serving.accept(state, version, labels))

    async def edit(self, change: Callable[[Serving], Serving]) -> None:
        self.serving = await asyncio.to_thread(serving.edit_serving, self.place, change, self._config.follow)
        await self.carry_out()

    async def look(self, watch: bool) -> None:
        """Follows changes of serving.json and, with `watch`, versions that another process has published."""
        now = await asyncio.to_thread(serving.read_serving, self.place, self._config.follow)
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
                await self.edit(lambda state: serving.accept(state, version, labels))
            elif verdict is not None:
                reason = verdict.reason
                await self.edit(lambda state: serving.refuse(state, version, reason))
            self._check = None
            newest = self._loaded.training
            if newest is not None and newest.id.version != version:
                await self.consider(newest.id.version)
