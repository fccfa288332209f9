"""Parts of a policy replica: its states and its door, draws, and how answers name their versions."""

import asyncio
import json
from typing import Any

import pytest

from sampo_ray.actors.policy.lifecycle import Door, Event, State, after
from sampo_ray.actors.policy.server import sampling_params, tokens_by_choice, versions_chunk


def test_a_draw_is_seeded_by_run_seed_prompt_and_sample_alone() -> None:
    def seed(*key: Any) -> int:
        return sampling_params(0.8, 0.95, 8, *key, end_of_turn_id=4).seed

    assert seed(0, "a", 0) == seed(0, "a", 0)
    assert len({seed(0, "a", 0), seed(1, "a", 0), seed(0, "b", 0), seed(0, "a", 1)}) == 4
    assert sampling_params(0.0, 0.95, 8, 0, "a", 0, end_of_turn_id=4).seed is None


def test_a_door_closes_once_nobody_is_inside_and_lets_in_who_came_meanwhile() -> None:
    async def main() -> None:
        door, said, end = Door(), list[str](), asyncio.Event()

        async def answer(name: str, until: asyncio.Event | None = None) -> None:
            async with door.inside():
                said.append(f"{name} begins")
                if until:
                    await until.wait()
                said.append(f"{name} ends")

        async def swap() -> None:
            async with door.closed():
                said.append("swap")

        first = asyncio.create_task(answer("first", end))
        await asyncio.sleep(0)
        swapping = asyncio.create_task(swap())
        await asyncio.sleep(0)
        second = asyncio.create_task(answer("second"))
        await asyncio.sleep(0.01)
        end.set()
        await asyncio.gather(first, swapping, second)
        assert said == ["first begins", "first ends", "swap", "second begins", "second ends"]

    asyncio.run(main())


def test_after_a_swap_that_failed_nobody_is_let_in() -> None:
    async def main() -> None:
        door = Door()
        with pytest.raises(RuntimeError):
            async with door.closed():
                raise RuntimeError("half-way")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), door.inside():
                pass

    asyncio.run(main())


def test_the_chunk_that_names_a_version_continues_the_stream_it_is_in() -> None:
    previous = (
        'data: {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "policy", "choices": [{}]}\n\n'
    )
    spans = [{"version": 10}, {"version": 20, "from_tokens": [5]}]
    chunk = versions_chunk(previous, spans)
    assert chunk.endswith("\n\n")
    header = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "policy"}
    assert json.loads(chunk.removeprefix("data: ")) == {**header, "choices": [], "policy_versions": spans}


def test_tokens_are_counted_by_choice_over_prompts_and_samples() -> None:
    emitted = [("chatcmpl-abc", 1, 2, 7), ("chatcmpl-other", 0, 1, 9)]
    assert tokens_by_choice("abc", emitted) == [None, 7]
    assert tokens_by_choice("abc", [("cmpl-abc-1", 0, 2, 3), ("cmpl-abc-0", 1, 2, 4)]) == [None, 4, 3]
    assert tokens_by_choice("abc", []) == []


def test_a_replica_goes_through_its_states_and_no_others() -> None:
    state = State.STARTING
    for event, expected in (
        (Event.ENGINE_UP, State.STALE),
        (Event.LOAD, State.LOADING),
        (Event.LOADED, State.READY),
        (Event.LOAD, State.LOADING),
        (Event.LOADED, State.READY),
        (Event.DRAIN, State.DRAINING),
    ):
        state = after(state, event)
        assert state == expected
    allowed = {(s, e) for s in State for e in Event if _goes(s, e)}
    assert {s for s, e in allowed if e == Event.FAIL} == set(State), "any replica may die"
    for state, event in [
        (State.STALE, Event.LOADED),
        (State.LOADING, Event.ENGINE_UP),
        (State.LOADING, Event.LOAD),
        (State.LOADING, Event.DRAIN),
        (State.DRAINING, Event.LOAD),
        (State.DEAD, Event.ENGINE_UP),
        (State.DEAD, Event.LOADED),
        (State.READY, Event.ENGINE_UP),
    ]:
        assert (state, event) not in allowed
    assert len(allowed) == 6 + len(State)


def _goes(state: State, event: Event) -> bool:
    try:
        after(state, event)
    except ValueError:
        return False
    return True
