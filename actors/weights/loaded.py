"""Which weights a store has in memory, and how readers wait for others."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from sampo_ray.actors.weights.client import Weights
from sampo_ray.run import serving
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.serving import Serving
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import VersionInfo, WeightsId, complete_versions, read_info, version_folder


class LoadedVersions:
    """The newest version of a run, the live one and the round's reference; any other is read from disk and `put`."""

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

    def labels(self, state: Serving, version: int) -> list[str]:
        return serving.all_labels(state, {version: self.info(version)})[version]

    def get(self, version: int) -> Weights:
        held = [w for w in (self.training, self.live, self.reference) if w and w.id.version == version]
        return held[0] if held else self._read(version)

    def is_newer(self, version: int) -> bool:
        return self.training is None or version > self.training.id.version

    def add(self, version: int, buckets: tuple[Bucket, ...]) -> None:
        self.training = self._of(version, buckets)

    def read_newest(self) -> int | None:
        """Reads the newest version on disk; None when there is none that is newer than the newest in memory."""
        newest = max(complete_versions(self.url), default=None)
        if newest is None or not self.is_newer(newest):
            return None
        weights = self._read(newest)
        if not self.is_newer(newest):  # another was published meanwhile
            return None
        self.training = weights
        return newest

    def is_live(self, state: Serving) -> bool:
        """Whether readers get what is live, or nothing is."""
        live = self.live
        return state.live is None or (live is not None and (live.id.version, live.sequence) == _position(state))

    def make_live(self, state: Serving) -> None:
        """Hands out the live version. It is read from disk if it is not in memory; WeightsError when it cannot be."""
        if state.live is not None and not self.is_live(state):
            self.live = replace(self.get(state.live), sequence=state.sequence)

    def holds(self, version: int | None) -> bool:
        """Whether a version is in memory."""
        return any(w is not None and w.id.version == version for w in (self.training, self.live, self.reference))

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


def _position(state: Serving) -> tuple[int | None, int]:
    return state.live, state.sequence


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
