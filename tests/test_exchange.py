"""How rounds reach the training ranks and results come back, without Ray."""

import asyncio
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray import ObjectRef
from ray.exceptions import ActorDiedError, ActorHandleNotFoundError, GetTimeoutError, OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from sampo_ray.actors.ranks.exchange import Closed, Exchange, Posted, RankFailure
from sampo_ray.actors.ranks.failures import cause_of_death, failure_of
from sampo_ray.actors.waiting import Wait
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.errors import ConfigError, TrainingError, VersionError, WeightsError
from sampo_ray.run.manifest import StepMetrics, StepResult, Stored
from sampo_ray.run.storage import Place

SOON, NEVER = 10.0, 0.01


def result(step: int, loss: float = 0.5, *published: int) -> StepResult:
    return StepResult(StepMetrics(0, step, step, {"loss": loss}), Stored(published))


def test_a_rank_takes_a_round_that_is_posted_while_it_waits_and_takes_it_once() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        taking = asyncio.create_task(exchange.take(0, SOON))
        await exchange.post(spec)
        posted = await taking
        assert isinstance(posted, Posted) and (posted.number, posted.spec) == (1, spec)
        assert await exchange.take(posted.number, NEVER) is None
        await exchange.close()
        assert isinstance(await exchange.take(posted.number, SOON), Closed)
        assert isinstance(await exchange.take(0, SOON), Posted), "a rank that was started again finishes the round"

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_ranks_that_are_started_again_after_a_rounds_end_take_the_next_one_only() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        assert isinstance(await exchange.take(0, SOON), Posted)
        await exchange.report(1, result(1))
        await exchange.finish()
        assert await exchange.results(0, SOON) == [result(1)], "what the driver has not read yet stays"
        assert await exchange.take(0, NEVER) is None, "ranks that start anew know of no round"
        taking = asyncio.create_task(exchange.take(0, SOON))
        await exchange.post("next")  # type: ignore[arg-type]
        assert await taking == Posted(2, "next")  # type: ignore[arg-type]
        await exchange.finish()
        await exchange.close()
        assert isinstance(await exchange.take(0, SOON), Closed)

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_results_come_in_order_and_the_first_of_a_step_counts() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        await exchange.report(1, result(2))
        assert await exchange.results(0, NEVER) == [], "the first step is missing"
        await exchange.report(1, result(1))
        await exchange.report(1, result(1, loss=9.0))
        await exchange.report(7, result(3))
        assert await exchange.results(0, SOON) == [result(1), result(2)]
        assert await exchange.results(2, NEVER) == [], "a result of another round is ignored"

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_what_was_stored_with_a_step_that_is_trained_again_comes_with_the_next_new_one() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        await exchange.report(1, result(1, 0.5, 1))
        for step in (1, 2, 3):  # ranks that went back, whose version 1 was complete only now
            await exchange.report(1, result(step, 9.0, step, step + 10))
        assert await exchange.results(0, SOON) == [
            result(1, 0.5, 1),
            result(2, 9.0, 1, 11, 2, 12),
            result(3, 9.0, 3, 13),
        ]
        await exchange.report(1, result(1, 0.5, 4))
        await exchange.post(spec)
        await exchange.report(2, result(1))
        assert await exchange.results(0, SOON) == [result(1)], "the round before had its last result"

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_the_first_lasting_failure_of_a_rank_is_raised_in_the_driver_at_once() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        waiting = asyncio.create_task(exchange.results(0, SOON))
        for reason in ("first", "second"):
            await exchange.failed(RankFailure(reason, lasting=True))
        with pytest.raises(TrainingError, match="^first$"):
            await waiting
        assert not await exchange.may_restart(None, "third")
        assert not await exchange.report(1, result(1)), "ranks that go on have nobody to work for"

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_what_follows_from_a_failure_that_may_pass_is_no_reason_to_stop() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        await exchange.failed(RankFailure("connection lost", lasting=False))
        await exchange.failed(RankFailure("KeyError: what the other rank would have sent", lasting=True))
        assert await exchange.may_restart(None, "other")
        assert await exchange.report(1, result(1))

    asyncio.run(work(Exchange(max_failures=2), object()))


@given(
    events=st.lists(st.sampled_from(["fail", "planned", "step", "again"]), max_size=30), max_failures=st.integers(0, 3)
)
def test_ranks_are_started_again_until_they_fail_too_often_without_a_new_step_between(events, max_failures) -> None:
    async def work() -> None:
        exchange, failures, step = Exchange(max_failures), 0, 0
        await exchange.post(object())
        for event in events:
            if event in ("fail", "planned"):
                await exchange.failed(RankFailure("gone", lasting=False))
                failures += event == "fail"
                goes_on = await exchange.may_restart(None, "other", counts=event == "fail")
            else:
                if event == "step":
                    step, failures = step + 1, 0
                goes_on = await exchange.report(1, result(max(step, 1)))
                step, failures = max(step, 1), 0 if step == 0 else failures
            assert goes_on == (failures <= max_failures)
            if not goes_on:
                words = f"failed {failures} times .*trainer.max_failures={max_failures}.*: gone"
                with pytest.raises(TrainingError, match=words):
                    await exchange.results(step, NEVER)
                return

    asyncio.run(work())


def test_steps_before_a_failure_reach_the_driver_before_it() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        await exchange.report(1, result(1))
        await exchange.failed(RankFailure("the pair makes no sense", lasting=True))
        assert await exchange.results(0, NEVER) == [result(1)]
        with pytest.raises(TrainingError, match="the pair makes no sense"):
            await exchange.results(1, NEVER)

    asyncio.run(work(Exchange(max_failures=2), object()))


def test_a_process_that_died_explains_the_errors_of_the_others() -> None:
    async def work(exchange: Exchange) -> None:
        await exchange.failed(RankFailure("RuntimeError: connection closed by peer", lasting=False))
        assert not await exchange.may_restart("the process of rank 1 ended", "other")
        with pytest.raises(TrainingError, match="of this: the process of rank 1 ended$"):
            await exchange.results(0, NEVER)

    asyncio.run(work(Exchange(max_failures=0)))


def test_a_driver_that_has_closed_takes_no_more_steps() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        assert await exchange.report(1, result(1))
        await exchange.close()
        assert not await exchange.report(1, result(2))
        assert not await exchange.may_restart(None, "other")

    asyncio.run(work(Exchange(max_failures=2), object()))


def of_another_process(cause: Exception) -> RayTaskError:
    """The error of a remote call, as `ray.get` raises it: with the class of its cause."""
    return RayTaskError("publish", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "lasting", "words"),
    [
        (ValueError("bad pair"), True, "ValueError: bad pair"),
        (KeyError("id"), True, "KeyError: 'id'"),
        (TrainingError("3 steps in a row"), True, "3 steps in a row"),
        (WeightsError("version.json is damaged"), True, "version.json is damaged"),
        (RuntimeError("NCCL error"), False, "RuntimeError: NCCL error"),
        (OSError("disk full"), False, "OSError: disk full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True, "trainer.tokens_per_row"),
        (of_another_process(VersionError("serving.lock is held")), False, "VersionError: serving.lock is held"),
        (of_another_process(ConfigError("host is not loopback")), False, "ConfigError: host is not loopback"),
        (GetTimeoutError("took too long"), False, "GetTimeoutError: took too long"),
        (ActorHandleNotFoundError("gone"), False, "ActorHandleNotFoundError: gone"),
    ],
)
def test_only_what_would_come_again_stops_the_training(error: Exception, lasting: bool, words: str) -> None:
    failure = failure_of(error, None)
    assert failure.lasting == lasting
    assert words in failure.reason and "\n" not in failure.reason


def test_out_of_gpu_memory_names_what_to_lower_and_its_value() -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "d", "max_length": 3000}, "run": {"dir": "r"}}
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")
    reason = failure_of(error, load_config(tree)).reason
    assert "out of GPU memory: CUDA out of memory" in reason and "trainer.tokens_per_row (now 6000)" in reason


def test_a_rank_that_was_killed_for_memory_is_told_from_one_that_only_lost_its_peer() -> None:
    killed = WorkerHealthCheckFailedError("a check failed", OutOfMemoryError("Task was killed: low on memory"))
    died = WorkerHealthCheckFailedError("a check failed", ActorDiedError())
    peer, mine = RuntimeError("connection closed by peer"), of_another_process(ValueError("x"))
    assert "rank 1 was killed because its node was out of memory; lower" in str(cause_of_death({0: peer, 1: killed}))
    assert "the process of rank 0 ended: The actor died" in str(cause_of_death({0: died, 1: peer}))
    assert cause_of_death({0: peer, 1: mine}) is None


def test_an_exchange_that_is_gone_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from sampo_ray.actors.ranks.trainer import Trainer

    def gone(*_: object, timeout: float) -> None:
        raise ActorDiedError()

    monkeypatch.setattr("ray.get", gone)
    trainer = Trainer(TrainerConfig(lifetime="round"), "store", Place("memory://logs"), Wait([], print, 1))
    with pytest.raises(TrainingError, match=r"does not answer \(ActorDiedError: The actor died unexpectedly"):
        trainer._ask(cast(ObjectRef, None))
