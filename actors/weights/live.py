"""Which weights a store has in memory, what the live policy serves (serving.json is followed and edited), and the
checks that a version must pass before it goes live: a probe of its answers, judged by what the recipe asks for."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import pyarrow as pa
import ray
import torch
from ray import serve
from ray.exceptions import RayError

from sampo_ray.actors.policy.messages import RolloutRequest
from sampo_ray.actors.weights.client import Weights
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.config.run import RunConfig
from sampo_ray.config.serving import GatesConfig, ServeConfig
from sampo_ray.errors import WeightsNotLoadedError
from sampo_ray.run import versions
from sampo_ray.run.buckets import Bucket, unpack
from sampo_ray.run.directory import open_run
from sampo_ray.run.parts import part_place
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import Serving, VersionInfo, WeightsId, complete_versions, read_info, version_folder

CHECK_TIMEOUT_S = 1800.0
CALL_SECONDS = 900.0
"""A generator may have to start first."""


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

    def labels(self, serving: Serving, version: int) -> list[str]:
        return versions.all_labels(serving, {version: self.info(version)})[version]

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


@dataclass(frozen=True)
class Probe:
    """A version's greedy answers to the probe prompts, one entry a prompt: tokens, whether it ended by itself, reward
    (empty without a reward source)."""

    tokens: Sequence[int]
    finished: Sequence[bool]
    rewards: Sequence[float | None] = ()


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str = ""


def judge(gates: GatesConfig, probe: Probe, before: Probe | None) -> Verdict:
    """Whether a version may go live. `before` is the probe of the last version that passed, on the same prompts."""
    mean = fmean(probe.tokens)
    if gates.max_mean_tokens is not None and mean > gates.max_mean_tokens:
        return Verdict(False, f"mean answer of {mean:.1f} tokens is above max_mean_tokens={gates.max_mean_tokens:g}")
    if before is None:
        return Verdict(True)
    allowed = None if gates.max_growth is None else gates.max_growth * fmean(before.tokens)
    if allowed is not None and mean > allowed:
        above = f"mean answer of {mean:.1f} tokens is above the {allowed:.1f} of max_growth={gates.max_growth:g}"
        return Verdict(False, above)
    if gates.min_win_rate is not None:
        rate = win_rate(probe.rewards, before.rewards)
        if rate is not None and rate < gates.min_win_rate:
            return Verdict(False, f"win rate of {rate:.3f} on the probe is below min_win_rate={gates.min_win_rate:g}")
    return Verdict(True)


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Share of prompts with the higher reward, ties half; None where no prompt has both rewards."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return fmean(0.5 if a == b else float(a > b) for a, b in both) if both else None


@ray.remote(num_cpus=0.1)
def check(apps: str, place: Place, run_id: str, version: int, before: int | None) -> Verdict | None:
    """Probes a version through the fleet's generators, keeps the probe in `probes/`, and judges it; None when training
    has moved on, so that no generator holds the version any more."""
    config = open_run(place.url).config
    gates = config.serve.gates
    if gates.finite and not _is_finite(place, version):
        return Verdict(False, "its weights are not all finite numbers")
    if not gates.probing:
        return Verdict(True)
    try:
        if gates.smoke is not None and not _answers(apps, place, config, (run_id, version), gates.smoke):
            return Verdict(False, "it gave no finished answer to the prompt serve.gates.smoke")
        last = None
        if before is not None:
            kept = _probe_file(place, before)
            last = Probe(**json.loads(kept.read())) if kept.exists() else None
        probe = _probe(apps, place, config, (run_id, version))
    except WeightsNotLoadedError:
        return None
    _probe_file(place, version).write(json.dumps(asdict(probe)).encode())
    return judge(gates, probe, last)


def _is_finite(place: Place, version: int) -> bool:
    folder = version_folder(place.at("versions").url, version)
    return all(bool(torch.isfinite(t).all()) for bucket in read_version(folder) for _, t in unpack(bucket))


def _answers(apps: str, place: Place, config: RunConfig, weights: tuple[str, int], prompt: str) -> bool:
    """Whether a version ends an answer to `prompt` by itself, and says something."""
    from sampo_ray.data.chat import ChatFormat

    with place.at("tokenizer").on_disk() as folder:
        ids = ChatFormat.load(folder, "tokenizer").prompt_ids([{"role": "user", "content": prompt}])
    block = pa.table({"id": ["smoke"], "prompt": pa.array([list(ids)], pa.list_(pa.int32()))})
    (row,) = _generate(apps, config, block, weights).to_pylist()
    return row["finish_reason"] == "stop" and bool(row["text"].strip())


def _probe(apps: str, place: Place, config: RunConfig, weights: tuple[str, int]) -> Probe:
    block = part_place(place.at("data"), 0).read_table().slice(0, config.serve.gates.probes)
    done = _generate(apps, config, block, weights)
    rewards: list[float | None] = []
    if config.serve.gates.min_win_rate is not None:
        scored = serve.get_app_handle(f"{apps}-rewards").score.remote(done).result(timeout_s=CALL_SECONDS)
        rewards = scored["reward"].to_pylist()
    finished = [reason == "stop" for reason in done["finish_reason"].to_pylist()]
    return Probe([len(ids) for ids in done["completion"].to_pylist()], finished, rewards)


def _generate(apps: str, config: RunConfig, block: pa.Table, weights: tuple[str, int]) -> pa.Table:
    room = config.data.max_length - max(len(ids) for ids in block["prompt"].to_pylist())
    tokens = max(1, min(config.rollout.max_tokens, room))
    request = RolloutRequest(1, 0.0, 1.0, tokens, seed=0, weights=WeightsId(*weights))
    generate = serve.get_app_handle(f"{apps}-generators").generate
    return generate.remote(block, range(len(block)), request).result(timeout_s=CALL_SECONDS)


def _probe_file(place: Place, version: int) -> Place:
    return place.at("probes", f"{version:06d}.json")
