"""Weights sent by a transport: real gloo groups between threads, and a process where one has to die."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.actors.transfer import transport
from sampo_ray.actors.transfer.backend import ReceiveJob, Receiver
from sampo_ray.actors.transfer.coordinator import TransferCoordinator, TransferGroup, TransferPlan
from sampo_ray.actors.transfer.sending import Sender
from sampo_ray.actors.transfer.transport import BroadcastReceiver, BroadcastSender, digest
from sampo_ray.actors.weights.client import Weights
from sampo_ray.run.buckets import joined, pack, views
from sampo_ray.run.versions import VersionInfo, WeightsId
from tests.waiting import scaled

CPU = torch.device("cpu")
LARGE = 16_000_000
"""Numbers of a tensor whose bytes no socket holds."""
JOINS_AND_STOPS = """
import json, sys, time, torch
from sampo_ray.actors.transfer.transport import BroadcastReceiver
from sampo_ray.actors.transfer.coordinator import TransferPlan
side = BroadcastReceiver(torch.device("cpu"))
side._join(TransferPlan(**json.loads(sys.argv[1])), int(sys.argv[2]), time.monotonic() + 60)
print("joined", flush=True)
time.sleep(60)
"""


def version(number: int, size: int = 200_000, buckets: int = 3) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return [(f"w{i}", torch.randn(size + i, generator=generator).to(torch.bfloat16)) for i in range(buckets)]


def announced(number: int, size: int = 200_000) -> Weights:
    """A version in three buckets, with their bytes in the place of references to them."""
    info = VersionInfo(version=number, round=0, step=number)
    return Weights(WeightsId("run", number), info, tuple(pack(version(number, size), 1)), number)


class Replica:
    """A replica whose engine is its workers' receive jobs. What it received: `tensors`, by worker."""

    def __init__(self, transfers: TransferCoordinator, workers: int = 1, channel: str = "training") -> None:
        self.client = SimpleNamespace(
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=workers)),
            collective_rpc=self._collective_rpc,
        )
        self.store = SimpleNamespace(
            join_transfer=SimpleNamespace(remote=lambda *args: asyncio.ensure_future(transfers.join(*args))),
            report_transfer=SimpleNamespace(remote=lambda *args: asyncio.ensure_future(transfers.report(*args))),
        )
        self.receiver = Receiver(self.client, "broadcast", channel)
        self.sides = [BroadcastReceiver(CPU) for _ in range(workers)]
        self.jobs: list[ReceiveJob] = []
        self.groups: list[int] = []

    async def _collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "receive_version":
            _, plan, places = json.loads(json.dumps(args))
            taken = TransferPlan(**plan)
            self.groups.append(taken.group)
            self.jobs = [ReceiveJob(side, taken, taken.rank + n, places, CPU) for n, side in enumerate(self.sides)]
            return [None] * len(self.sides)
        return [each.problem if each.done else None for each in self.jobs]

    async def come(self, weights: Weights) -> list[dict[str, torch.Tensor]] | None:
        """What its workers have received of this version; None: it is left with the host path."""
        update = await self.receiver.receive(self.store, weights)
        if update is None:
            return None
        specs = list(update.specs())
        return [dict(views(specs, each.data)) for each in self.jobs]


class BlockingTransfers:
    """A coordinator's calls for a thread, while its event loop runs in another."""

    def __init__(self, transfers: TransferCoordinator, loop: asyncio.AbstractEventLoop) -> None:
        self._transfers, self._loop = transfers, loop

    def gather(self, weights: WeightsId, timeout_s: float) -> TransferGroup | None:
        return self._done(self._transfers.gather(weights, timeout_s))

    def start(self, weights: WeightsId, limit_s: float, details: object) -> None:
        self._done(self._transfers.start(weights, limit_s, details))

    def finish(self, weights: WeightsId, timeout_s: float, succeeded: bool) -> list[str]:
        return self._done(self._transfers.finish(weights, timeout_s, succeeded))

    def _done(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(scaled(60))


class Trainer:
    """A sender, and the coordinator of a store whose newest weights are those that were published last. Its limits are
    for those who come: a test that waits for one to pass names it.
    """

    def __init__(self, gather_s: float = 600.0, send_s: float = 600.0) -> None:
        self.newest: Weights | None = None
        self.transfers = TransferCoordinator(
            lambda channel: self.newest.id if self.newest and channel == "training" else None
        )
        self.calls = BlockingTransfers(self.transfers, asyncio.get_running_loop())
        self.set_limits(gather_s, send_s)

    def set_limits(self, gather_s: float, send_s: float) -> None:
        self.sender = Sender(BroadcastSender(CPU), self.calls, gather_s, send_s, fetched=lambda bucket, _: bucket)

    def _wanted(self, channel: str) -> WeightsId | None:
        return self.newest.id if self.newest and channel == "training" else None

    async def publish(self, weights: Weights) -> None:
        await self.transfers.offer(weights.id)
        self.newest = weights
        self.sender.send(weights.id, weights.buckets)

    async def end(self) -> None:
        await asyncio.to_thread(self.sender.wait)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), scaled(120)))


def assert_is(
    number: int, received: list[dict[str, torch.Tensor]] | None, workers: int = 1, size: int = 200_000
) -> None:
    assert received is not None and len(received) == workers
    for tensors in received:
        for name, expected in version(number, size):
            assert torch.equal(tensors[name], expected)


def test_all_workers_of_all_replicas_get_all_bytes_and_one_group_lasts() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replicas = [Replica(trainer.transfers, workers) for workers in (1, 2)]
        for replica in replicas:
            assert await replica.come(announced(0)) is None, "nobody sends it"
        for number in (1, 2, 3):
            await trainer.publish(weights := announced(number))
            for workers, received in zip(
                (1, 2), await asyncio.gather(*(each.come(weights) for each in replicas)), strict=True
            ):
                assert_is(number, received, workers)
            await trainer.end()
        assert [each.groups for each in replicas] == [[1, 1, 1], [1, 1, 1]]

    run(scenario)


def test_a_replica_that_joins_or_leaves_changes_the_group_of_the_next_version() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        first, late = Replica(trainer.transfers), Replica(trainer.transfers)
        await first.come(announced(0))
        await trainer.publish(weights := announced(1))
        assert_is(1, await first.come(weights))
        await trainer.end()
        assert await late.come(weights) is None, "it is too late for this one"
        await trainer.publish(weights := announced(2))
        for received in await asyncio.gather(first.come(weights), late.come(weights)):
            assert_is(2, received)
        await trainer.end()
        late.receiver.leave(late.store)  # type: ignore[arg-type]
        await trainer.publish(weights := announced(3))
        assert_is(3, await first.come(weights))
        await trainer.end()
        assert (first.groups, late.groups) == ([1, 2, 3], [2])

    run(scenario)


def test_a_damaged_bucket_is_refused_and_the_next_version_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check = transport.check_digest

    def damaged(data: torch.Tensor, expected: int, bucket: int) -> None:
        if bucket == 1:
            data[123_456] ^= 4
        check(data, expected, bucket)

    async def scenario() -> None:
        trainer = Trainer()
        replica = Replica(trainer.transfers)
        await replica.come(announced(0))
        monkeypatch.setattr(transport, "check_digest", damaged)
        await trainer.publish(weights := announced(1))
        assert await replica.come(weights) is None
        assert "WeightsError: bucket 1: checksum" in replica.jobs[0].problem
        assert not replica.jobs[0].data.numel()
        await trainer.end()
        monkeypatch.undo()
        assert await replica.come(weights) is None, "it is back under another id"
        await trainer.publish(weights := announced(2))
        assert_is(2, await replica.come(weights))
        await trainer.end()
        assert replica.groups == [1, 2]

    run(scenario)


def test_what_was_not_announced_is_refused() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replica = Replica(trainer.transfers)
        await replica.come(announced(0))
        await trainer.publish(announced(1))
        assert await replica.come(replace(announced(1, size=100), sequence=1)) is None
        assert "it is not what was announced" in replica.jobs[0].problem
        await trainer.end()

    run(scenario)


def test_a_replica_that_does_not_join_is_not_waited_for_beyond_the_limit_nor_a_second_time() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replica, gone, elsewhere = (
            Replica(trainer.transfers),
            Replica(trainer.transfers),
            Replica(trainer.transfers, channel="live"),
        )
        for each in (replica, gone, elsewhere):
            await each.come(announced(0))
        for number, limit in ((1, scaled(1.0)), (2, 600.0)):
            trainer.set_limits(limit, 600.0)
            await trainer.publish(weights := announced(number))
            assert_is(number, await replica.come(weights))
            await trainer.end()
        gone.receiver.leave(gone.store)  # type: ignore[arg-type]
        replica.receiver.leave(replica.store)  # type: ignore[arg-type]
        await trainer.publish(weights := announced(3))
        await trainer.end()
        assert await replica.come(weights) is None, "no replica joined, so nothing was sent"

    run(scenario)


def test_a_member_that_takes_a_plan_and_no_part_costs_the_limit_and_no_more() -> None:
    async def scenario() -> None:
        trainer = Trainer(send_s=scaled(3.0))
        replica, silent = Replica(trainer.transfers), Replica(trainer.transfers)
        for each in (replica, silent):
            await each.come(announced(0))
        begun = time.monotonic()
        await trainer.publish(weights := announced(1))
        joining = asyncio.ensure_future(trainer.transfers.join(silent.receiver._replica, weights.id, 60))
        assert await replica.come(weights) is None
        assert await joining is not None
        await trainer.end()
        assert time.monotonic() - begun < scaled(10)
        assert await replica.come(weights) is None
        await trainer.publish(weights := announced(2))
        assert_is(2, await replica.come(weights))
        await trainer.end()

    run(scenario)


async def begun_with(trainer: Trainer, replica: Replica, doomed: Replica) -> tuple[Any, TransferPlan]:
    """What `replica` will get of version 1, and the plan that `doomed` has for it."""
    for each in (replica, doomed):
        await each.come(announced(0))
    await trainer.publish(weights := announced(1, LARGE))
    coming = asyncio.ensure_future(replica.come(weights))
    plan = await trainer.transfers.join(doomed.receiver._replica, weights.id, 60)
    assert plan is not None
    return coming, plan


async def assert_over_within(seconds: float, trainer: Trainer, replica: Replica, coming: Any) -> None:
    begun = time.monotonic()
    if (received := await coming) is not None:  # the root had sent to it first
        assert_is(1, received, size=LARGE)
    await trainer.end()
    assert time.monotonic() - begun < scaled(seconds)
    await replica.come(announced(1, LARGE))
    await trainer.publish(weights := announced(2))
    assert_is(2, await replica.come(weights))
    await trainer.end()
    assert replica.groups == [1, 2]


def test_a_member_that_dies_in_mid_broadcast_does_not_hold_the_root_up() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replica, doomed = Replica(trainer.transfers), Replica(trainer.transfers)
        coming, plan = await begun_with(trainer, replica, doomed)
        command = [sys.executable, "-c", JOINS_AND_STOPS, json.dumps(asdict(plan)), str(plan.rank)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"joined\n"
            process.kill()
        await assert_over_within(5.0, trainer, replica, coming)

    run(scenario)


def test_a_member_that_hangs_in_mid_broadcast_costs_the_limit_and_no_more() -> None:
    async def scenario() -> None:
        trainer = Trainer(send_s=scaled(3.0))
        replica, doomed = Replica(trainer.transfers), Replica(trainer.transfers)
        coming, plan = await begun_with(trainer, replica, doomed)
        await asyncio.to_thread(doomed.sides[0]._join, plan, plan.rank, time.monotonic() + 60)
        await assert_over_within(6.0, trainer, replica, coming)

    run(scenario)


def test_a_root_that_is_gone_leaves_its_members_to_the_host_path() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replica = Replica(trainer.transfers)
        await replica.come(announced(0))
        await trainer.transfers.offer((weights := announced(1)).id)
        trainer.newest = weights
        coming = asyncio.ensure_future(replica.come(weights))
        await asyncio.sleep(0.1)
        assert await trainer.transfers.gather(weights.id, 1.0) is not None
        await trainer.transfers.start(weights.id, 2.0, {"host": "127.0.0.1", "port": 9})
        assert await coming is None

    run(scenario)


def test_a_bucket_is_received_to_where_the_host_path_would_have_staged_it() -> None:
    buckets = list(pack(version(0, 1000), 1))
    places, specs = joined(buckets)
    assert [start % 64 for start, _ in places] == [0, 0, 0]
    data = torch.zeros(sum(places[-1]), dtype=torch.uint8)
    for (start, size), bucket in zip(places, buckets, strict=True):
        assert size == bucket.data.size
        data[start : start + size] = torch.from_numpy(bucket.data)
    assert all(
        torch.equal(found, expected)
        for (_, found), (_, expected) in zip(views(specs, data), version(0, 1000), strict=True)
    )


@given(st.integers(1, 200_000), st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_shows_in_the_digest(size: int, position: int, bit: int) -> None:
    data = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    before = digest(data)
    assert digest(data.clone()) == before
    assert -(1 << 63) <= before < 1 << 63
    data[position % size] ^= 1 << bit
    assert digest(data) != before


@given(st.integers(1, 100_000), st.integers(1, 24_000))
def test_bytes_in_another_place_show_in_the_digest(shift: int, other: int) -> None:
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 200_000, np.uint8))
    assert digest(data.roll(shift)) != digest(data)
    assert digest(data[: 8 * other]) != digest(data[: 8 * other + 8])


def test_an_ipc_handle_becomes_plain_values_and_torchs_arguments_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU: that the arguments come back in the places where torch has them."""
    data = torch.zeros(24, dtype=torch.uint8)
    shared = (data.__class__, data.size(), data.stride(), 0, type(data._typed_storage()), torch.uint8, 0)
    arguments = (*shared, b"handle", 24, 512, False, b"counter", 3, b"event", True)
    monkeypatch.setattr(transport, "rebuild_cuda_tensor", lambda *given: given)
    sent = transport.plain(arguments)
    assert sent == [b"handle", 24, 512, b"counter", 3, b"event", True]
    assert transport.rebuilt(sent, 24, torch.device("cuda", 0)) == arguments  # type: ignore[comparison-overlap]


def test_an_offer_is_forgotten_when_another_one_replaces_it() -> None:
    async def scenario() -> None:
        trainer = Trainer()
        replica = Replica(trainer.transfers)
        await trainer.transfers.offer(announced(1).id)
        coming = asyncio.ensure_future(replica.come(announced(1)))
        await asyncio.sleep(0.05)
        await trainer.transfers.offer(announced(2).id)
        assert await asyncio.wait_for(coming, scaled(5)) is None
        assert await trainer.transfers.gather(announced(1).id, 5) is None
        assert await trainer.transfers.finish(announced(1).id, 5, True) == []

    run(scenario)
