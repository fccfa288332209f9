"""GPUs that engines and training ranks share by time: who may use them, and how a replica obeys."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ray.exceptions import GetTimeoutError, RayActorError

from sampo_ray.actors.policy import replica_weights, turns
from sampo_ray.actors.policy.lifecycle import AnswersInFlight, ReplicaState, RequestGate
from sampo_ray.actors.policy.replica_weights import LoadedWeights, ReplicaWeights, WeightsSource
from sampo_ray.actors.policy.turns import EngineTurns
from sampo_ray.actors.weights.client import Weights
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.actors.weights.store import WeightStore
from sampo_ray.actors.weights.turns import SILENT_S, GpuTurns, SharedGpus, Turn
from sampo_ray.errors import PausedError, StageError
from sampo_ray.loop import turns as orders
from sampo_ray.run.report import PinState
from sampo_ray.run.versions import VersionInfo, WeightsId
from tests.waiting import scaled, wait_until

REPLICAS = st.integers(0, 2)


class TakingTurns(RuleBasedStateMachine):
    """Replicas that obey, die and start again, and a store that restarts, in any order; the clock is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.turns, self.names = 0.0, GpuTurns("engines", 0.0), 0
        self.awake: dict[int, tuple[str, bool]] = {}
        """Of each replica: the name of its process, and whether its engine uses a GPU."""
        self.ranks = False

    @rule(seconds=st.sampled_from([0.1, 4.0, 9.0]))
    def time_passes(self, seconds: float) -> None:
        """Those who live ask every five seconds, in any state."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 5.0)
            for name, awake in self.awake.values():
                if awake:
                    self.turns.ask(name, False, self.now)

    @rule(replica=REPLICAS)
    def replica_starts(self, replica: int) -> None:
        if replica not in self.awake:
            self.names += 1
            self.awake[replica] = f"process {self.names}", False

    @rule(replica=REPLICAS)
    def replica_dies(self, replica: int) -> None:
        self.awake.pop(replica, None)

    @rule(replica=REPLICAS)
    def replica_asks_and_obeys(self, replica: int) -> None:
        if replica in self.awake:
            name, awake = self.awake[replica]
            if self.turns.ask(name, not awake, self.now) == "ranks":
                self.turns.ask(name, True, self.now)
                self.awake[replica] = name, False
            else:
                self.awake[replica] = name, True

    @rule()
    def store_restarts(self) -> None:
        self.turns = GpuTurns(self.turns.turn, self.now)

    @precondition(lambda self: not self.ranks)
    @rule()
    def driver_wants_the_gpus(self) -> None:
        self.turns.turn = "ranks"

    @precondition(lambda self: self.turns.turn == "ranks")
    @rule()
    def driver_trains_if_it_may(self) -> None:
        self.ranks = self.ranks or self.turns.are_free(self.now)

    @rule()
    def driver_gives_them_back(self) -> None:
        self.ranks, self.turns.turn = False, "engines"

    @invariant()
    def never_both(self) -> None:
        assert not (self.ranks and any(awake for _, awake in self.awake.values()))


TestTakingTurns = TakingTurns.TestCase
TestTakingTurns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ranks_get_the_gpus_once_all_engines_sleep_or_are_silent() -> None:
    gpus = GpuTurns("engines", since=-SILENT_S - 1)
    assert gpus.ask("a", True, 0.0) == gpus.ask("b", True, 0.0) == "engines"
    gpus.turn = "ranks"
    assert gpus.ask("a", False, 1.0) == "ranks" and not gpus.are_free(1.0)
    gpus.ask("a", True, 2.0)
    assert not gpus.are_free(SILENT_S - 1), "b has said nothing, and may be alive"
    assert gpus.are_free(SILENT_S + 1)
    gpus.ask("b", False, SILENT_S + 2)
    assert not gpus.are_free(SILENT_S + 3), "it lives, after all"


def test_the_store_answers_as_soon_as_there_is_something_to_do() -> None:
    async def main() -> None:
        gpus = SharedGpus()
        gpus._turns._since -= 2 * SILENT_S
        assert await gpus.ask("a", True, 60.0) == "engines", "it may start at once"
        asked = asyncio.create_task(gpus.ask("a", False, 60.0))
        await asyncio.sleep(0.01)
        assert not asked.done()
        given = asyncio.create_task(gpus.give("ranks", 60.0))
        assert await asyncio.wait_for(asked, scaled(10)) == "ranks"
        waiting = asyncio.create_task(gpus.ask("a", True, 60.0))
        assert await asyncio.wait_for(given, scaled(10))
        assert await gpus.give("engines", 0.0)
        assert await asyncio.wait_for(waiting, scaled(10)) == "engines"
        assert not await gpus.give("ranks", 0.0), "it uses the GPU again"

    asyncio.run(main())


class Store:
    """A weight store in this process, which is away while `away`."""

    def __init__(self, turn: Any = "engines") -> None:
        self.turn, self.away, self.asked = turn, False, list[bool]()
        self.gpu_turn = SimpleNamespace(remote=self._ask)

    def _ask(self, replica: str, sleeps: bool, timeout_s: float) -> str:
        if self.away:
            raise RayActorError()
        self.asked.append(sleeps)
        return self.turn


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(turns, "find_weight_store", lambda name: store)
    monkeypatch.setattr(turns, "ray", SimpleNamespace(get=lambda value, timeout: time.sleep(0.001) or value))
    monkeypatch.setattr(turns, "CHANGING_S", 0.01)
    made = list[EngineTurns]()
    begin = EngineTurns.__init__

    def noted(self: EngineTurns, name: str) -> None:
        made.append(self)
        begin(self, name)

    monkeypatch.setattr(EngineTurns, "__init__", noted)
    yield store
    for each in made:
        each.close()


def test_a_replica_starts_sleeps_and_wakes_when_it_is_its_turn(store: Store) -> None:
    log = list[str]()

    async def main() -> None:
        store.turn = "ranks"
        replica = EngineTurns("store")
        starting = asyncio.create_task(replica.may_start())
        await asyncio.to_thread(wait_until, lambda: len(store.asked) > 3, "questions")
        assert not starting.done() and all(store.asked)
        store.turn = "engines"
        await asyncio.wait_for(starting, scaled(10))
        store.turn = "ranks"  # while it starts, it uses the GPU all the same
        count = len(store.asked)
        await asyncio.to_thread(wait_until, lambda: len(store.asked) > count + 3, "questions")
        assert not any(store.asked[count + 2 :])

        async def change(what: str) -> None:
            await asyncio.sleep(0.05)
            log.append(what)

        replica.follow(lambda: change("sleep"), lambda: change("wake"))
        await asyncio.to_thread(wait_until, lambda: log == ["sleep"] and store.asked[-1], "sleep")
        store.away = True
        await asyncio.sleep(0.05)
        store.away, store.turn = False, "engines"
        await asyncio.to_thread(wait_until, lambda: log == ["sleep", "wake"] and not store.asked[-1], "wake")

    asyncio.run(main())


def test_a_replica_whose_engine_cannot_sleep_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons, ended = list[str](), threading.Event()

    def end(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    monkeypatch.setattr(turns, "end_process", end)

    async def main() -> None:
        async def fail() -> None:
            raise RuntimeError("no host memory")

        replica = EngineTurns("store")
        await replica.may_start()
        store.turn = "ranks"
        replica.follow(fail, fail)
        assert await asyncio.to_thread(ended.wait, scaled(10))
        assert "ranks" in reasons[0] and "no host memory" in reasons[0]

    asyncio.run(main())


class Engine:
    """An engine of two workers with a GPU each, and what was done with it."""

    output_processor = SimpleNamespace(request_states={})

    def __init__(self) -> None:
        self.calls, self.free = list[str](), [10, 12]
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))

    async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[Any]:
        if method == "free_bytes":
            return list(self.free)
        return [True, True]

    async def sleep(self, level: int, mode: str) -> None:
        self.calls.append(f"sleep {level} {mode}")
        self.free = [100, 100]

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: object, **more: object) -> None:
            self.calls.append(name)

        return call


def test_weights_that_come_while_an_engine_sleeps_are_loaded_before_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = Engine(), RequestGate()
    held = ReplicaWeights(engine, WeightsSource("store"), gate, AnswersInFlight())  # type: ignore[arg-type]
    held.loaded, held.state = LoadedWeights(WeightsId("run", 0)), ReplicaState.READY
    newest = [Weights(WeightsId("run", 8), VersionInfo(version=8, round=0, step=8), ())]

    async def newer(timeout_s: float) -> Weights | None:
        await asyncio.sleep(0.001)
        return None if held.loaded.id == newest[0].id else newest[0]

    monkeypatch.setattr(held, "_newer", newer)
    monkeypatch.setattr(replica_weights, "MEMORY_LOOK_S", 0.01)

    async def main() -> None:
        following = asyncio.create_task(held.follow())
        await held.sleep()
        engine.free = [20, 20]  # the ranks' turn
        assert held.state == ReplicaState.ASLEEP and held.loaded.id.version in (0, 8)
        newest[0] = Weights(WeightsId("run", 16), VersionInfo(version=16, round=0, step=16), ())
        before = engine.calls.copy()
        await held.adopt(newest[0])
        assert engine.calls == before and held.loaded.id.version != 16
        with pytest.raises(PausedError):
            gate.refuse_in_pause()

        waking = asyncio.create_task(held.wake())
        await asyncio.sleep(0.05)
        assert "wake_up" not in engine.calls, "the ranks' memory is not free yet"
        engine.free = [110, 108]
        await asyncio.wait_for(waking, scaled(30))
        assert (held.loaded.id.version, held.state) == (16, ReplicaState.READY)
        assert engine.calls.index("wake_up") < len(engine.calls) - 1 - engine.calls[::-1].index("update_weights")
        gate.refuse_in_pause()
        following.cancel()

    asyncio.run(main())


def test_an_engine_whose_gpu_stays_taken_does_not_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_weights, "MEMORY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(replica_weights, "MEMORY_LOOK_S", 0.01)
    engine = Engine()
    held = ReplicaWeights(engine, WeightsSource("store"), RequestGate(), AnswersInFlight())  # type: ignore[arg-type]
    held.state = ReplicaState.READY

    async def main() -> None:
        await held.sleep()
        engine.free = [50, 100]
        with pytest.raises(Exception, match="its GPUs were not free"):
            await held.wake()
        assert "wake_up" not in engine.calls

    asyncio.run(main())


def test_a_pinned_version_says_why_it_does_not_answer_in_the_ranks_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {3: PinState(state="pinned"), 4: PinState(state="failing", reason="no memory")}
    monkeypatch.setattr(PinnedApps, "states", states)

    async def reasons(turn: Turn) -> list[str | None]:
        await store.give_gpus(turn, 0.0)
        return [each.reason for each in (await store.state()).pins.values()]

    async def work() -> None:
        asleep, why = await reasons("ranks")
        assert asleep is not None and asleep.endswith("while the ranks train on its GPUs (fleet.placement=shared)")
        assert why == "no memory"
        assert await reasons("engines") == [None, "no memory"]

    store = WeightStore(str(tmp_path / "store.json"), "fleet")
    asyncio.run(work())


def test_the_driver_does_not_wait_for_engines_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    asked: Any = SimpleNamespace(give_gpus=SimpleNamespace(remote=lambda turn, timeout_s: turn))
    monkeypatch.setattr(orders, "ray", SimpleNamespace(get=lambda call, timeout: next(answers, False)))
    orders.give_gpus(asked, "ranks")
    with pytest.raises(StageError, match="still use the GPUs"):
        orders.give_gpus(asked, "ranks", limit_s=0.01)


def test_a_driver_that_ends_leaves_the_gpus_to_the_engines_if_there_is_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[str]()
    gone: Any = SimpleNamespace(give_gpus=SimpleNamespace(remote=lambda turn, timeout_s: given.append(turn)))

    def get(call: object, timeout: float) -> bool:
        raise GetTimeoutError

    monkeypatch.setattr(orders, "ray", SimpleNamespace(get=get))
    orders.return_gpus(gone)
    assert given == ["engines"]
