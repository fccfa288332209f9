"""How rounds reach the training ranks and results come back, without Ray."""

import asyncio
from typing import Any

import pytest

from sampo_ray.actors.ranks.exchange import Closed, Exchange, Posted
from sampo_ray.errors import TrainingError
from sampo_ray.run.manifest import StepMetrics, StepResult

SOON, NEVER = 10.0, 0.01


def result(step: int, loss: float = 0.5) -> StepResult:
    return StepResult(StepMetrics(0, step, step, {"loss": loss}))


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

    asyncio.run(work(Exchange(), object()))


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

    asyncio.run(work(Exchange(), object()))


def test_the_first_reason_of_ranks_that_gave_up_is_raised_in_the_driver() -> None:
    async def work(exchange: Exchange, spec: Any) -> None:
        await exchange.post(spec)
        for reason in ("first", "second"):
            await exchange.fail(reason)
        with pytest.raises(TrainingError, match="^first$"):
            await exchange.results(0, SOON)

    asyncio.run(work(Exchange(), object()))
