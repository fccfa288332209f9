"""Which weights a store has in memory, and how readers wait for others."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from sampo_ray.actors.weights.client import Weights
from sampo_ray.run import serving
from sampo_ray.run.buckets import Bucket
from sampo_ray.run.serving import Serving
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import (
    VersionInfo,
    WeightsId,
    complete_versions,
    newest_version,
    read_info,
    version_folder,
)


class LoadedVersions:
    """The newest version of a run and the live one, which are read from disk and `put`. There are never more than two
    whole ones: what nobody needs is let go before another is read. Not for several threads at once."""

    def __init__(self, run: str, versions_url: str, put: Callable[[Bucket], Bucket]) -> None:
        self.run, self.url, self._put = run, versions_url, put
        self.training: Weights | None = None
        self.live: Weights | None = None
        self.newest: int | None = None
        """The version of `training`, also while that is being read."""
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

    def read_newest(self) -> int | None:
        """Reads the newest version on disk; None when there is none that is newer than the newest in memory."""
        version = newest_version(self.url, after=-1 if self.newest is None else self.newest)
        if version is None:
            return None
        if self.training is not None and not self._is_in_use(self.training, version):
            self.training = None  # readers wait for the next one
        self.training, self.newest = self._read(version), version
        return version

    def is_live(self, state: Serving) -> bool:
        """Whether readers get what is live, or nothing is."""
        live = self.live
        return state.live is None or (live is not None and (live.id.version, live.sequence) == _position(state))

    def make_live(self, state: Serving) -> None:
        """Hands out the live version. It is read from disk if it is not in memory; WeightsError when it cannot be."""
        if state.live is None or self.is_live(state):
            return
        if self.live is not None and not self.holds(state.live) and not self._is_in_use(self.live, state.live):
            self.info(state.live)
            self.live = None
        held = [w for w in (self.training, self.live) if w and w.id.version == state.live]
        self.live = replace(held[0] if held else self._read(state.live), sequence=state.sequence)

    def holds(self, version: int | None) -> bool:
        """Whether a version is in memory."""
        return any(w is not None and w.id.version == version for w in (self.training, self.live))

    def _is_in_use(self, weights: Weights, coming: int) -> bool:
        """Whether the buckets of these weights are needed besides, or those of the version that comes are its base."""
        other = self.live if weights is self.training else self.training
        adapters = self.info(coming).adapters
        shared = other is not None and other.buckets is weights.buckets
        return shared or (adapters is not None and adapters.base == _whole(weights))

    def _read(self, version: int) -> Weights:
        """A version's weights; of adapters, with the buckets of their base, which are shared."""
        weights_id, info = WeightsId(self.run, version), self.info(version)
        buckets = tuple(self._put(bucket) for bucket in read_version(version_folder(self.url, version)))
        if info.adapters is None:
            return Weights(weights_id, info, buckets, version)
        (adapters,) = buckets
        held = [w for w in (self.training, self.live) if w and _whole(w) == info.adapters.base]
        base = held[0] if held else self._read(info.adapters.base)
        return Weights(weights_id, info, base.buckets, version, adapters)


def _whole(weights: Weights) -> int:
    """The version that the buckets of weights are of."""
    return weights.id.version if weights.info.adapters is None else weights.info.adapters.base


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
