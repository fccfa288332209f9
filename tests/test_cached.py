"""A value that is read at most once in a while: its age, its failures, reads that hang and callers that leave."""

import asyncio
import contextvars
from collections.abc import Awaitable
from typing import Any

import pytest

from sampo_ray.serve.cached import CachedRead


class Clock:
    """A clock that tests set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Counts its reads; each returns its number, or raises `error`, once `open` is set."""

    def __init__(self) -> None:
        self.count, self.error, self.open = 0, None, asyncio.Event()
        self.open.set()

    async def read(self) -> int:
        self.count += 1
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return self.count


def cached(source: Source, timeout_s: float = 60.0) -> tuple[CachedRead[int], Clock]:
    clock = Clock()
    return CachedRead(source.read, max_age_s=1.0, timeout_s=timeout_s, clock=clock), clock


async def outcomes(*asked: Awaitable[int]) -> list[Any]:
    """Values and types of errors."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    return [type(each) if isinstance(each, BaseException) else each for each in found]


def test_a_value_is_read_again_when_it_is_old_and_somebody_asks() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source)
        assert source.count == 0
        assert [await value.get(), await value.get()] == [1, 1]
        clock.now += 0.9
        assert await value.get() == 1
        clock.now += 0.2
        assert source.count == 1
        assert await value.get() == 2

    asyncio.run(scenario())


def test_all_callers_share_one_read_and_its_value_or_error() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source)
        assert await outcomes(*(value.get() for _ in range(20))) == [1] * 20
        clock.now += 1.0
        source.error = OSError("gone")
        assert await outcomes(*(value.get() for _ in range(20))) == [OSError] * 20
        assert source.count == 2

    asyncio.run(scenario())


def test_a_failed_read_counts_as_one_and_leaves_the_last_value() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source)
        source.error = OSError("not there yet")
        assert await outcomes(value.get()) == [OSError] and value.last is None
        clock.now += 1.0
        source.error = None
        assert await value.get() == 2
        clock.now += 1.0
        source.error = ValueError("broken")
        for _ in range(3):
            assert await outcomes(value.get()) == [ValueError]
            assert value.last == 2
        assert source.count == 3
        clock.now += 1.0
        source.error = None
        assert await value.get() == 4

    asyncio.run(scenario())


def test_a_read_that_hangs_delays_those_who_ask_in_its_time_and_is_the_only_one() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source, timeout_s=0.05)
        source.open.clear()
        assert await outcomes(*(value.get() for _ in range(5))) == [TimeoutError] * 5
        clock.now += 10.0
        overdue = asyncio.ensure_future(value.get())
        await asyncio.wait({overdue}, timeout=30)  # at once: a limit for a failure only
        assert isinstance(overdue.exception(), TimeoutError)
        assert source.count == 1
        source.open.set()
        while value.last is None:
            await asyncio.sleep(0)
        assert await value.get() == 1  # its age counts from its end
        clock.now += 1.0
        assert await value.get() == 2

    asyncio.run(scenario())


def test_a_caller_that_leaves_does_not_end_the_read_of_the_others() -> None:
    request = contextvars.ContextVar("request", default="none")
    seen = []

    async def scenario() -> None:
        source = Source()

        async def read() -> int:
            seen.append(request.get())
            return await source.read()

        value = CachedRead(read, max_age_s=1.0, timeout_s=60.0)
        source.open.clear()
        request.set("first")
        first, second = (asyncio.ensure_future(value.get()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        source.open.set()
        assert await second == 1 and first.cancelled()

    asyncio.run(scenario())
    assert seen == ["none"], "a read belongs to no request"


def test_a_value_that_is_known_already_needs_no_read() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source)
        value.set(7)
        assert await value.get() == 7
        clock.now += 1.0
        assert await value.get() == 1

    asyncio.run(scenario())


def test_a_read_that_began_before_a_value_was_set_does_not_replace_it() -> None:
    async def scenario() -> None:
        source = Source()
        value, clock = cached(source)
        source.open.clear()
        reading = asyncio.ensure_future(value.get())
        await asyncio.sleep(0)
        value.set(70)
        assert await value.get() == 70, "at once, though the read hangs"
        source.open.set()
        assert await reading == 70 and value.last == 70
        clock.now += 1.0
        assert await value.get() == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("runs", [1, 3])
def test_a_value_outlives_the_event_loop_that_read_it(runs: int) -> None:
    source = Source()
    value, clock = cached(source)
    for run in range(1, runs + 1):
        assert asyncio.run(value.get()) == run
        clock.now += 1.0
