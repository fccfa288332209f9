"""What the live policy serves: serving.json is followed and edited, and versions are checked before they go live."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from sampo_ray.actors.weights.duty import Duty, result_within
from sampo_ray.actors.weights.gates import Verdict, check
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.config.serving import ServeConfig
from sampo_ray.errors import WeightsError
from sampo_ray.run import commands, serving
from sampo_ray.run.commands import Command
from sampo_ray.run.report import Trouble
from sampo_ray.run.serving import Done, Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import VersionInfo, is_complete, version_folder

CHECK_TIMEOUT_S = 1800.0
LOOK_S = 1.0
REMOTE_LOOK_S = 15.0
"""For versions in object storage of which the store is told."""
LOCK_WAIT_S = 2.0
"""The store's own edits are tried again, so they need not wait long for serving.json."""
PUBLISH_WAIT_S, LOAD_WAIT_S = 10.0, 40.0


class LivePolicy:
    """Follows and edits a run's serving.json, in duties: a file that is held or damaged, weights that cannot be read
    and checks that cannot be made are tried again, and none of it stops who publishes. Edits are made with `lock` held,
    reading weights is not. `watch`: another process trains the run, and makes the checks.
    """

    def __init__(
        self, loaded: LoadedVersions, poll: LongPoll, pinned: PinnedApps, lock: asyncio.Lock, watch: bool = False
    ) -> None:
        self._loaded, self._poll, self._pinned, self._lock, self._watch = loaded, poll, pinned, lock, watch
        self.place = Place(loaded.url.rstrip("/").rsplit("/", 1)[0])
        self.serving = Serving()
        self._carried_out: Serving | None = None
        self._config: ServeConfig | None = None
        self._reading = asyncio.Lock()
        self._published = set[int]()
        """Versions that serving.json does not know yet."""
        self._file = Duty("serving.json", self._follow, LOOK_S)
        looks = LOOK_S if watch or self.place.local else REMOTE_LOOK_S
        self._newest = Duty("the newest version", self._read_newest, looks)
        self._live = Duty("the live version", self._load, 10 * LOOK_S)
        self._checks = Duty("the checks of a version", self._check, 10 * LOOK_S)
        self._duties = self._file, self._newest, self._live, self._checks

    @property
    def is_steady(self) -> bool:
        """Whether each version goes live as soon as it is published."""
        config, known = self._config, not self._published and self._file.trouble is None
        follows = self.serving.follow == "latest" and not self.serving.held
        return config is not None and known and follows and not config.gates.any

    @property
    def troubles(self) -> tuple[Trouble, ...]:
        return tuple(duty.trouble for duty in self._duties if duty.trouble is not None)

    async def recover(self) -> None:
        """Reads the run directory: its newest version and what is live. Raises what stands against it."""
        await asyncio.to_thread(self._loaded.read_newest)
        await asyncio.to_thread(self._read_serving)
        await asyncio.to_thread(self._loaded.make_live, self.serving)
        await self._poll.announce()
        await self._carry_out()

    def start(self) -> None:
        for duty in self._duties:
            duty.start()

    def close(self) -> None:
        """Another run is attached."""
        for duty in self._duties:
            duty.close()

    async def ready(self, timeout_s: float) -> None:
        """Waits until serving.json has been read, or could not be."""
        await self._file.first_step(timeout_s)

    async def publish(self) -> None:
        """Looks for the newest version; it goes live if it is followed, after its checks if there are any. Raises what
        stands against reading it. Trouble with serving.json is no trouble of the publisher's: the version is considered
        again."""
        await self._find_newest()
        self._checks.wake()
        await self._file.stepped(PUBLISH_WAIT_S)

    async def command(self, id: str, command: Command, infos: Mapping[int, VersionInfo]) -> tuple[Done, bool]:
        """Carries out an operator's command once, and says whether it had been before; VersionError when it cannot be
        carried out. `infos` are the versions on disk."""
        before = list[Done | None]()

        def change(state: Serving) -> Serving:
            before.append(commands.done_before(state, id, command))
            return commands.apply_once(state, infos, id, command)

        await self._edit(change, serving.LOCK_SECONDS)
        await self._carry_out()
        return self.serving.done[-1] if before[-1] is None else before[-1], before[-1] is not None

    async def checked(self, timeout_s: float) -> bool:
        """Whether no version is to be checked any more. Waits for that up to `timeout_s`."""
        await self._find_newest()
        until = time.monotonic() + timeout_s
        while (version := await self._candidate()) is not None and time.monotonic() < until:
            await asyncio.sleep(LOOK_S / 4)
        return version is None

    async def loaded(self) -> None:
        """Waits for some time until readers get what is live."""
        if not self._loaded.is_live(self.serving):
            await self._live.stepped(LOAD_WAIT_S)

    async def _edit(self, change: Callable[[Serving], Serving], wait_s: float = LOCK_WAIT_S) -> None:
        follow = self._config.follow if self._config else "latest"
        self.serving = await asyncio.to_thread(serving.edit_serving, self.place, change, follow, wait_s)

    async def _carry_out(self) -> None:
        """Makes readers and pins follow `serving`, unless they do."""
        if self.serving == self._carried_out:
            return
        if not self._loaded.is_live(self.serving) and self._loaded.holds(self.serving.live):
            self._loaded.make_live(self.serving)
            await self._poll.announce()
        self._live.wake()
        self._pinned.want(self.place, self._loaded.run, self.serving)
        self._carried_out = self.serving

    async def _follow(self) -> bool:
        """Follows changes of serving.json, and tells it which versions were published."""
        async with self._lock:
            before, config = self.serving, self._config
            now = await asyncio.to_thread(serving.read_serving, self.place, config.follow) if config else None
            if now is None or (now.live is None and before.live is not None):  # a start, or the file was removed
                await asyncio.to_thread(self._read_serving)
            elif now.sequence < before.sequence:  # an older file was put back
                await self._edit(lambda state: serving.after(state, before.sequence))
            else:
                self.serving = now
            await self._carry_out()  # also where the next line fails
            await self._tell_published()
            await self._carry_out()
        return True

    async def _tell_published(self) -> None:
        """Makes published versions live if they are followed; those that must pass checks wait for them."""
        if self._are_checked:
            self._published &= {0}
        if new := sorted(self._published):
            labels = serving.all_labels(self.serving, await asyncio.to_thread(self._loaded.on_disk))
            there = {version: labels[version] for version in new if version in labels}  # else it is gone again
            await self._edit(lambda state: serving.trim(serving.accept_all(state, there), labels))
            self._published -= {*new}

    def _read_serving(self) -> None:
        """Reads the settings and what is served; versions whose publisher was killed before they were live are now."""
        config, known = serving.read_serve_config(self.place), self.serving.sequence
        if labels := serving.all_labels(Serving(), self._loaded.on_disk()):

            def change(state: Serving) -> Serving:
                resumed = serving.trim(serving.resume(state, labels, config.gates.any), labels)
                return resumed if resumed.sequence >= known else serving.after(resumed, known)

            self.serving = serving.edit_serving(self.place, change, config.follow, LOCK_WAIT_S)
        self._config = config

    async def _read_newest(self) -> bool:
        """Finds versions of which nobody has told: another process has published them, or the one that did ended."""
        if await self._find_newest():
            self._checks.wake()
            self._file.wake()
        return True

    async def _find_newest(self) -> bool:
        async with self._reading:
            newest = await asyncio.to_thread(self._loaded.read_newest)
        if newest is not None:
            self._published.add(newest)
            await self._poll.announce()
        return newest is not None

    async def _load(self) -> bool:
        """Reads the live version from disk if it is not in memory, and hands it out."""
        async with self._reading:
            state = self.serving
            await asyncio.to_thread(self._loaded.make_live, state)
        await self._poll.announce()
        return self._loaded.is_live(self.serving)

    @property
    def _are_checked(self) -> bool:
        """Whether versions go live after checks only: those of this store's fleet or of the process that trains."""
        return self._config is not None and self._config.gates.any and (self._watch or bool(self._pinned.apps))

    async def _candidate(self) -> int | None:
        """The newest version if it is to be checked here; of those that the run evaluates, if that decides."""
        version, state = self._loaded.newest, self.serving
        if self._config is not None and self._config.gates.probe:
            ends = await asyncio.to_thread(self._loaded.on_disk)
            version = max((v for v, info in ends.items() if serving.is_followed("round", info.labels)), default=None)
        if self._watch or not self._are_checked or not version:
            return None
        known = version in state.passed or version in state.refused
        folder = version_folder(self._loaded.url, version)
        return None if known or not await asyncio.to_thread(is_complete, folder) else version

    async def _check(self) -> bool:
        """Checks the newest version, which retention leaves alone meanwhile. That its checks could not be made says
        nothing about a version: it stays a candidate, and they are made again."""
        version = await self._candidate()
        if self.serving.checking != version and not self._watch:
            async with self._lock:
                await self._edit(lambda state: state.model_copy(update={"checking": version}))
        if version is None:
            return True
        before = max((v for v in self.serving.passed if v < version), default=None)
        call = check.remote(self._pinned.apps, self.place, self._loaded.run, version, before)
        verdict: Verdict | None = await result_within(call, CHECK_TIMEOUT_S)
        if verdict is not None:
            async with self._lock:
                labels = serving.all_labels(self.serving, await asyncio.to_thread(self._loaded.on_disk))
                await self._edit(lambda state: serving.trim(_judged(state, version, labels, verdict), labels))
                await self._carry_out()
        elif self._loaded.newest == version:
            raise WeightsError(f"no generator holds version {version} yet, or the run has not evaluated it")
        return False


def _judged(state: Serving, version: int, labels: Mapping[int, Sequence[str]], verdict: Verdict) -> Serving:
    state = state.model_copy(update={"checking": None})
    if not verdict.passed:
        return serving.refuse(state, version, verdict.reason)
    return serving.accept(state, version, labels[version]) if version in labels else state
