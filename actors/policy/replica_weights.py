"""The weights that a policy replica computes with: how it follows the weight store and swaps newer ones in."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from ray.exceptions import RayError
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from sampo_ray.actors.policy import lifecycle
from sampo_ray.actors.policy.lifecycle import ReplicaEvent, ReplicaState, end_process, logger
from sampo_ray.actors.policy.messages import LivePosition, ReplicaStatus, WeightsChanged
from sampo_ray.actors.transfer.backend import HostUpdate, Receiver, staged_weights
from sampo_ray.actors.weights.client import Channel, Weights, find_weight_store, throttle
from sampo_ray.errors import WeightsError, WeightsNotLoadedError
from sampo_ray.internals.vllm import requests_in_flight
from sampo_ray.run.buckets import Bucket, checksum, flat, unpack, verify, views
from sampo_ray.run.versions import VersionInfo, WeightsId
from sampo_ray.training.lora import MATRICES, file_name, merged

POLL_S, RETRY_S = 30.0, 2.0
FETCH_TIMEOUT_S = 300.0
SWAP_TIMEOUT_S = 120.0
POSITION_TIMEOUT_S = 10.0
PAUSE_DRAIN_S, SLEEP_TIMEOUT_S = 60.0, 300.0
"""Until answers that are in flight when their engine is to sleep are cut off; until it sleeps, or is awake."""
MEMORY_TIMEOUT_S, MEMORY_LOOK_S = 120.0, 0.5
PREPARE_TIMEOUT_S, PREPARE_SLICE_S = 600.0, 0.025
FIRST_WEIGHTS_TIMEOUT_S = 600.0
SHARE_OF_A_CORE = 0.2  # of the time: for staging new weights where the engine computes on the same cores
NO_WEIGHTS = WeightsId("", -1)  # an id that no store knows
T = TypeVar("T")


@dataclass(frozen=True)
class WeightsSource:
    """What a replica serves: a channel of the named weight store or, for good, the one version it is built from."""

    store: str = ""
    channel: Channel = "live"
    pinned: WeightsId | None = None
    swap: Literal["keep", "wait"] = "keep"
    drain_s: float = 300.0  # with swap=wait: seconds that answers in flight may take to finish
    adapters: str | None = None  # run directory with LoRA adapters to serve, each loaded when `policy@NAME` names it
    max_rank: int = 0
    takes_turns: bool = False  # with the training ranks, on the GPUs of both (actors/policy/turns.py)
    transport: Literal["host", "ipc", "broadcast"] = "host"  # of new weights (actors/transfer/transport.py)


@dataclass(frozen=True)
class LoadedWeights:
    """The weights that an engine computes with; `swaps` counts those it has had."""

    id: WeightsId
    info: VersionInfo | None = None
    swaps: int = 0
    sequence: int = 0

    @property
    def salt(self) -> str:
        """Keeps prefix blocks of other weights apart, also after a return to earlier weights (by `swaps`)."""
        return f"{self.id}#{self.swaps}"


class ReplicaWeights:
    """Loads a replica's weights into its engine. A swap pauses the engine, loads, and resumes; requests in flight keep
    their KV cache. When an update fails half-way, the process ends, because the engine holds a mixture of weights.
    """

    def __init__(
        self, client: AsyncLLM, source: WeightsSource, gate: lifecycle.RequestGate, answers: lifecycle.AnswersInFlight
    ) -> None:
        self._client, self._source, self._gate, self._answers = client, source, gate, answers
        self.loaded, self.state = LoadedWeights(NO_WEIGHTS), ReplicaState.STARTING
        self._replaced, self._changed = set[WeightsId](), asyncio.Condition()
        self._changing, self._awake = asyncio.Lock(), asyncio.Event()
        self._awake.set()
        self._needed = list[int]()  # bytes on each GPU that waking takes
        receives = source.pinned is None and source.transport != "host"
        self._receiver = Receiver(client, source.transport, source.channel) if receives else None

    @property
    def status(self) -> ReplicaStatus:
        now, info = self.loaded.id, self.loaded.info
        round, step = (info.round, info.step) if info else (None, None)
        return {"run": now.run, "version": now.version, "round": round, "step": step, "state": str(self.state)}

    def changed(self) -> WeightsChanged:
        return WeightsChanged(self.loaded.id, self.loaded.sequence)

    def advance(self, event: ReplicaEvent) -> None:
        self.state = lifecycle.next_state(self.state, event)

    def pin(self, weights: LoadedWeights) -> None:
        """Serves the weights that the engine was built from for good."""
        self.advance(ReplicaEvent.LOAD)
        self.loaded = weights
        self.advance(ReplicaEvent.LOADED)

    def end(self) -> None:
        """Takes a replica that ends out of the transfers of its store."""
        self.advance(ReplicaEvent.END)
        if self._receiver:
            with suppress(ValueError):  # the store has ended before
                self._receiver.leave(find_weight_store(self._source.store))

    async def wait_for(self, weights: WeightsId) -> None:
        """Waits for weights that are on their way. WeightsNotLoadedError if they do not come, or have passed."""

        def passed() -> bool:
            now = self.loaded.id
            return weights in self._replaced or (now.run == weights.run and now.version > weights.version)

        await self._until(lambda: self.loaded.id == weights or passed(), FETCH_TIMEOUT_S)
        if self.loaded.id != weights:
            holds = f"this replica holds {self.loaded.id}"
            raise WeightsNotLoadedError(f"rollouts were asked for from {weights}, but {holds}")

    async def wait_until_at(self, position: LivePosition) -> None:
        """Waits for weights no older than those a client has seen. WeightsNotLoadedError if they do not come."""

        def reached() -> bool:
            return self.loaded.id.run != position.run or self.loaded.sequence >= position.sequence

        await self._until(reached, POSITION_TIMEOUT_S)
        if not reached():
            raise WeightsNotLoadedError(f"this replica still holds {self.loaded.id}, older than a client has seen")

    async def catch_up(self) -> None:
        """Loads what the store hands out, until there is nothing newer. WeightsError if the store never has any."""
        await self._client.init_weight_transfer_engine(WeightTransferInitRequest({}))
        deadline = time.monotonic() + FIRST_WEIGHTS_TIMEOUT_S
        weights = await self._newer(POLL_S)
        while weights or self.loaded.id == NO_WEIGHTS:
            if weights:
                await self.adopt(weights)
            elif time.monotonic() > deadline:
                waited = f"weight store {self._source.store!r} has had no weights for {FIRST_WEIGHTS_TIMEOUT_S:.0f} s"
                raise WeightsError(f"{waited}; publish version 0")
            weights = await self._newer(POLL_S if self.loaded.id == NO_WEIGHTS else 0)

    async def sleep(self) -> None:
        """Lets answers end, for a while, and leaves the GPUs: the weights go to host memory, the KV cache is dropped.
        Until `wake`, requests wait or are refused, and newer weights stay in the store."""
        async with self._changing:
            self._awake.clear()
            await self._gate.pause(min(self._source.drain_s, PAUSE_DRAIN_S))
            self.advance(ReplicaEvent.SLEEP)
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                before = await self._client.collective_rpc("free_bytes")
                await self._client.sleep(level=1, mode="abort")
                after = await self._client.collective_rpc("free_bytes")
        self._needed = [now - then for then, now in zip(before, after, strict=True)]
        logger.info("asleep; freed %.1f GiB on each GPU", min(self._needed) / 2**30)

    async def wake(self) -> None:
        """Takes the GPUs back, and the store's weights if they are newer, before it answers."""
        async with self._changing:
            await self._memory_is_free()
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                await self._client.wake_up()
            self.advance(ReplicaEvent.WAKE)
            self._awake.set()
        async with self._serving_on():
            while weights := await self._newer(0):
                await self.adopt(weights)
        self._gate.resume()
        logger.info("awake on %s", self.loaded.id)

    async def _memory_is_free(self) -> None:
        """Waits for what sleeping had freed: ranks whose driver was killed may be ending just now."""
        until = time.monotonic() + MEMORY_TIMEOUT_S
        while time.monotonic() < until:
            free = await self._client.collective_rpc("free_bytes")
            if all(each >= needed for each, needed in zip(free, self._needed, strict=True)):
                return
            await asyncio.sleep(MEMORY_LOOK_S)
        raise WeightsError(f"its GPUs were not free within {MEMORY_TIMEOUT_S:.0f} s")

    async def follow(self) -> None:
        """Loads each newer version of the store, for ever."""
        while True:
            await self._awake.wait()
            async with self._serving_on():
                if weights := await self._newer(POLL_S):
                    await self.adopt(weights)

    @asynccontextmanager
    async def _serving_on(self) -> AsyncIterator[None]:
        """Around what may fail before anything was changed (a failure in a swap itself ends the process)."""
        try:
            yield
        except (RayError, WeightsError, TimeoutError, ValueError, OSError) as error:
            logger.warning("still on %s, could not get newer weights: %s", self.loaded.id, error)
            await asyncio.sleep(RETRY_S)

    async def adopt(self, weights: Weights) -> None:
        """Swaps weights in, unless the engine sleeps: it takes the newest when it wakes."""
        async with self._changing:
            if self._awake.is_set():
                await self._adopt(weights)

    async def _adopt(self, weights: Weights) -> None:
        """Gets weights, prepares what can be done beside the engine's work, and swaps them in."""
        if weights.id == self.loaded.id:  # only their place in the order of live weights has changed
            await self._set(replace(self.loaded, sequence=weights.sequence))
            return
        async with self._received(weights) as update:
            begun = time.perf_counter()
            await self._prepare(update)
            drains = self._source.swap == "wait"
            self.advance(ReplicaEvent.LOAD)
            try:
                async with (
                    asyncio.timeout(SWAP_TIMEOUT_S + (self._source.drain_s if drains else 0)),
                    self._gate.closed() if drains else nullcontext(),
                ):
                    paused = time.perf_counter()
                    await self._swap(update, weights)
                    resumed = time.perf_counter()
            except Exception as error:
                self.advance(ReplicaEvent.END)
                end_process(f"loading {weights.id} failed half-way: {error!r}")
            self.advance(ReplicaEvent.LOADED)
            await self._client.collective_rpc("release_weights")
        took = 1000 * (paused - begun), 1000 * (resumed - paused)
        logger.info("now on %s: prepared in %.0f ms, then paused for %.0f ms", weights.id, *took)

    async def _newer(self, timeout_s: float) -> Weights | None:
        now = self.loaded
        known = (None, None) if now.id == NO_WEIGHTS else (now.id, now.sequence)
        waiting = find_weight_store(self._source.store).wait.remote(known[0], timeout_s, self._source.channel, known[1])
        return await asyncio.wait_for(waiting, timeout_s + FETCH_TIMEOUT_S)

    @asynccontextmanager
    async def _received(self, weights: Weights) -> AsyncIterator[HostUpdate]:
        """Gets weights, verified, to where the engine's workers can read them."""
        if self._receiver and weights.adapters is None:
            received = await self._receiver.receive(find_weight_store(self._source.store), weights)
            if received is not None:
                yield received
                return
        buckets = [await fetched(bucket) for bucket in weights.buckets]
        engine_computes = current_platform.is_cpu() and requests_in_flight(self._client)
        share, merge = SHARE_OF_A_CORE if engine_computes else 1.0, None
        if weights.adapters is not None and weights.info.adapters is not None:
            adapters = await fetched(weights.adapters)
            check_belongs(adapters, buckets)
            merge = await asyncio.to_thread(merging, adapters, weights.info.adapters.scaling, share)
        async with in_thread(staged_weights(buckets, share, merge)) as update:
            del buckets
            yield update

    async def _prepare(self, update: HostUpdate) -> None:
        """Has the workers do, between the steps of the engine, what can be done before the pause."""
        begin: dict[str, object] | None = dict(vars(update))
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            while not all(await self._client.collective_rpc("prepare_weights", args=(begin, PREPARE_SLICE_S))):
                begin = None

    async def _swap(self, update: HostUpdate, weights: Weights) -> None:
        await self._client.pause_generation(mode="keep", clear_cache=False)
        self._answers.note_swap(weights.id.version, requests_in_flight(self._client))
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(vars(update)))
        await self._client.finish_weight_update()
        self._replaced.add(self.loaded.id)
        self._replaced.discard(weights.id)
        await self._set(LoadedWeights(weights.id, weights.info, self.loaded.swaps + 1, weights.sequence))
        await self._client.resume_generation()

    async def _set(self, weights: LoadedWeights) -> None:
        async with self._changed:
            self.loaded = weights
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Returns when the condition on `loaded` holds, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)


async def fetched(bucket: Bucket) -> Bucket:
    return replace(bucket, data=await asyncio.wait_for(bucket.data, FETCH_TIMEOUT_S))


@asynccontextmanager
async def in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves a blocking context manager without blocking the event loop."""
    value = await asyncio.to_thread(context.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def check_belongs(adapters: Bucket, base: Iterable[Bucket]) -> None:
    """WeightsError for adapters on weights that their base does not have, which no merge would apply."""
    known = {file_name(spec.name, side) for bucket in base for spec in bucket.specs for side in MATRICES}
    if unknown := {spec.name for spec in adapters.specs} - known:
        raise WeightsError(
            f"{min(unknown)} and {len(unknown) - 1} more adapters are on no weight of their base version"
        )


def merging(adapters: Bucket, scaling: float, share: float = 1.0) -> Callable[[Bucket], Bucket]:
    """A function that merges LoRA adapters into a bucket of their base and works no more than `share` of the time; both
    raise WeightsError for damaged bytes.
    """
    parts = dict(unpack(adapters))

    def merge(bucket: Bucket) -> Bucket:
        adapted = [spec for spec in bucket.specs if file_name(spec.name, "A") in parts]
        if not adapted:
            return bucket
        begun = time.perf_counter()
        verify(bucket)
        data = bucket.data.copy()
        throttle(begun, share)
        for spec, (name, weight) in zip(adapted, views(adapted, flat(bucket.data)), strict=True):
            begun = time.perf_counter()
            a, b = (parts[file_name(name, side)] for side in MATRICES)
            new = merged(weight, a, b, scaling).to(weight.dtype)
            flat(data)[spec.offset : spec.offset + spec.nbytes] = new.view(torch.uint8).flatten()
            throttle(begun, share)
        return replace(bucket, data=data, checksum=checksum(data))

    return merge
