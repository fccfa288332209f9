"""Parts of a policy replica: its states, its request gate, sampling, and how answers name their versions."""

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from sampo_ray.actors.policy.answers import answer_items, sampling_params, with_progress, with_progress_between
from sampo_ray.actors.policy.deployment import COPIES, PolicyServer, local_folder
from sampo_ray.actors.policy.lifecycle import (
    AnswersInFlight,
    ReplicaEvent,
    ReplicaState,
    RequestGate,
    TokensSoFar,
    next_state,
    tokens_by_choice,
)
from sampo_ray.actors.policy.messages import (
    AnswerItem,
    Chunks,
    Failure,
    Progress,
    RolloutRequest,
    VersionSpan,
    WeightsChanged,
)
from sampo_ray.actors.policy.replica_weights import ReplicaWeights, WeightsSource
from sampo_ray.errors import PausedError
from sampo_ray.internals.vllm import RequestProgress
from sampo_ray.run.versions import WeightsId
from tests.waiting import scaled


def test_a_draw_is_seeded_by_run_seed_prompt_and_sample_alone() -> None:
    def seed(seed: int, prompt_id: str, sample: int) -> int:
        return sampling_params(RolloutRequest(1, 0.8, 0.95, 8, seed), prompt_id, sample, end_of_turn_id=4).seed

    assert seed(0, "a", 0) == seed(0, "a", 0)
    assert len({seed(0, "a", 0), seed(1, "a", 0), seed(0, "b", 0), seed(0, "a", 1)}) == 4
    assert sampling_params(RolloutRequest(1, 0.0, 0.95, 8, 0), "a", 0, end_of_turn_id=4).seed is None


def test_a_gate_closes_once_no_request_is_in_flight_and_opens_again_for_those_that_came_meanwhile() -> None:
    async def main() -> None:
        gate, log, end = RequestGate(), list[str](), asyncio.Event()

        async def answer(name: str, until: asyncio.Event | None = None) -> None:
            async with gate.request():
                log.append(f"{name} begins")
                if until:
                    await until.wait()
                log.append(f"{name} ends")

        async def swap() -> None:
            async with gate.closed():
                log.append("swap")

        first = asyncio.create_task(answer("first", end))
        await asyncio.sleep(0)
        swapping = asyncio.create_task(swap())
        await asyncio.sleep(0)
        second = asyncio.create_task(answer("second"))
        await asyncio.sleep(0.01)
        end.set()
        await asyncio.gather(first, swapping, second)
        assert log == ["first begins", "first ends", "swap", "second begins", "second ends"]

    asyncio.run(main())


def test_after_a_swap_that_failed_no_request_passes_the_gate() -> None:
    async def main() -> None:
        gate = RequestGate()
        with pytest.raises(RuntimeError):
            async with gate.closed():
                raise RuntimeError("half-way")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), gate.request():
                pass

    asyncio.run(main())


def test_in_a_pause_rollouts_wait_and_others_are_refused_after_what_was_in_flight_has_ended() -> None:
    async def main() -> None:
        gate, log, end = RequestGate(), list[str](), asyncio.Event()

        async def answer(name: str, waits: bool) -> None:
            async with gate.request(waits):
                log.append(name)
                await end.wait()

        first = asyncio.create_task(answer("first", False))
        await asyncio.sleep(0)
        pausing = asyncio.create_task(gate.pause(drain_s=60))
        rollout = asyncio.create_task(answer("rollout", True))
        await asyncio.sleep(0.01)
        with pytest.raises(PausedError):
            await answer("refused", False)
        with pytest.raises(PausedError):
            gate.refuse_in_pause()
        assert not pausing.done() and log == ["first"]
        end.set()
        await asyncio.gather(first, pausing)
        async with gate.closed():  # newer weights, before the pause is over
            pass
        assert log == ["first"]
        gate.resume()
        await rollout
        assert log == ["first", "rollout"]

    asyncio.run(main())


def test_a_pause_does_not_wait_for_ever_for_an_answer() -> None:
    async def main() -> None:
        gate = RequestGate()
        async with gate.request(waits=False):
            await asyncio.wait_for(gate.pause(drain_s=0.01), scaled(30))

    asyncio.run(main())


def test_tokens_are_counted_by_choice_over_prompts_and_samples() -> None:
    requests = [RequestProgress("chatcmpl-abc", 1, 2, 7), RequestProgress("chatcmpl-other", 0, 1, 9)]
    assert tokens_by_choice("abc", requests) == [None, 7]
    requests = [RequestProgress("cmpl-abc-1", 0, 2, 3), RequestProgress("cmpl-abc-0", 1, 2, 4)]
    assert tokens_by_choice("abc", requests) == [None, 4, 3]
    assert tokens_by_choice("abc", []) == []


def test_a_replica_goes_through_its_states_and_no_others() -> None:
    state = ReplicaState.STARTING
    for event, expected in (
        (ReplicaEvent.ENGINE_UP, ReplicaState.STALE),
        (ReplicaEvent.LOAD, ReplicaState.LOADING),
        (ReplicaEvent.LOADED, ReplicaState.READY),
        (ReplicaEvent.LOAD, ReplicaState.LOADING),
        (ReplicaEvent.LOADED, ReplicaState.READY),
        (ReplicaEvent.SLEEP, ReplicaState.ASLEEP),
        (ReplicaEvent.WAKE, ReplicaState.READY),
        (ReplicaEvent.END, ReplicaState.DEAD),
    ):
        state = next_state(state, event)
        assert state == expected
    allowed = {(s, e) for s in ReplicaState for e in ReplicaEvent if _goes(s, e)}
    assert {s for s, e in allowed if e == ReplicaEvent.END} == set(ReplicaState), "any replica may end"
    for state, event in [
        (ReplicaState.STALE, ReplicaEvent.LOADED),
        (ReplicaState.LOADING, ReplicaEvent.ENGINE_UP),
        (ReplicaState.LOADING, ReplicaEvent.LOAD),
        (ReplicaState.DEAD, ReplicaEvent.LOAD),
        (ReplicaState.DEAD, ReplicaEvent.ENGINE_UP),
        (ReplicaState.DEAD, ReplicaEvent.LOADED),
        (ReplicaState.READY, ReplicaEvent.ENGINE_UP),
        (ReplicaState.LOADING, ReplicaEvent.SLEEP),
        (ReplicaState.ASLEEP, ReplicaEvent.LOAD),
        (ReplicaState.ASLEEP, ReplicaEvent.SLEEP),
    ]:
        assert (state, event) not in allowed
    assert len(allowed) == 6 + len(ReplicaState)


def _goes(state: ReplicaState, event: ReplicaEvent) -> bool:
    try:
        next_state(state, event)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("state", [None, *ReplicaState])
def test_a_replica_that_is_stopped_ends_its_tasks_and_its_engine_whatever_it_is_doing(
    state: ReplicaState | None, tmp_path: Path
) -> None:
    """`state` None: it has been told to start, and has no weights yet."""

    async def main() -> tuple[list[str], bool]:
        ended: list[str] = []

        async def close() -> None:
            ended.append("channel")

        replica = PolicyServer.__new__(PolicyServer)
        client = SimpleNamespace(shutdown=lambda: ended.append("engine"))
        replica.engine = SimpleNamespace(shutdown=close, _engine_client=client)
        following = asyncio.create_task(asyncio.sleep(60))
        if state:
            replica._weights = ReplicaWeights(client, WeightsSource("store"), RequestGate(), AnswersInFlight())
            replica._weights.state = state
            replica._tasks = [following]
        await asyncio.sleep(0)
        await replica.__del__()
        replica.engine = None  # collected, it is not ended again
        return ended, following.cancelled()

    ended, cancelled = asyncio.run(main())
    assert ended == ["channel", "engine"] and cancelled == (state is not None)


def test_a_replica_that_is_stopped_before_its_engine_is_made_ends_too() -> None:
    replica = PolicyServer.__new__(PolicyServer)
    replica.engine = None
    asyncio.run(replica.__del__())


def test_a_replicas_copy_of_a_remote_folder_is_one_and_ends_with_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fsspec.filesystem("memory").pipe_file("/run/versions/000000/config.json", b"{}")
    folder = local_folder("memory://run/versions/000000")  # as the tokenizer's
    assert [each.name for each in tmp_path.rglob("config.json")] == ["config.json"] and Path(folder).is_dir()
    COPIES.close()
    assert not list(tmp_path.iterdir())
    assert local_folder(str(tmp_path)) == str(tmp_path)


def test_the_tokens_of_choices_that_have_ended_still_count() -> None:
    so_far = TokensSoFar()
    assert [so_far.update(each) for each in ([1, 2], [5, None, 1], [None, None, 4], [])] == [3, 8, 11, 11]


def test_while_an_answer_is_awaited_its_tokens_so_far_are_told() -> None:
    async def slow(seconds: float) -> AsyncGenerator[AnswerItem, None]:
        await asyncio.sleep(seconds)
        yield Chunks(["first"])
        yield Chunks(["last"])

    async def read(items: AsyncGenerator[AnswerItem, None]) -> list[AnswerItem]:
        return [item async for item in items]

    async def main() -> None:
        counts = iter(range(10, 1000))
        *progress, first, last = await read(with_progress(slow(0.5), lambda: next(counts)))
        assert (first, last) == (Chunks(["first"]), Chunks(["last"]))
        assert progress[:2] == [Progress(10), Progress(11)] and len(progress) < 8
        items = with_progress(slow(60), lambda: 1)
        assert await anext(items) == Progress(1)
        await items.aclose()  # ends what it waits for
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_stream_tells_its_tokens_too_since_an_event_may_have_several() -> None:
    async def stream() -> AsyncGenerator[AnswerItem, None]:
        for _ in range(30):
            await asyncio.sleep(0.01)
            yield Chunks(["text"])

    async def read() -> list[AnswerItem]:
        return [item async for item in with_progress_between(stream(), lambda: 7)]

    items = asyncio.run(read())
    assert items.count(Chunks(["text"])) == 30 and items[0] == Chunks(["text"])
    assert 1 <= items.count(Progress(7)) < 8


def items_of(batches: Sequence[list[Any]], spans: list[VersionSpan]) -> list[AnswerItem]:
    async def batched() -> AsyncIterator[list[Any]]:
        for batch in batches:
            yield batch

    async def read() -> list[AnswerItem]:
        changed = WeightsChanged(WeightsId("run", 20), 2)
        return [item async for item in answer_items(batched(), spans, lambda: changed)]

    return asyncio.run(read())


def test_an_engines_error_in_a_stream_ends_it_as_a_failure_after_what_came_before() -> None:
    error = {"error": {"message": "out of memory", "type": "InternalServerError", "param": None, "code": 500}}
    failed = f"data: {json.dumps(error)}\n\n"
    assert items_of([["data: {}\n\n", failed, "data: [DONE]\n\n"]], [{"version": 10}]) == [
        Chunks(["data: {}\n\n"]),
        Failure(500, "out of memory"),
    ]
    assert items_of([[failed]], [{"version": 10}]) == [Failure(500, "out of memory")]
    refused = ErrorResponse(error=ErrorInfo(message="no such role", type="BadRequestError", param="role", code=400))
    assert items_of([[refused]], [{"version": 10}]) == [Failure(400, "no such role", "role")]


def chunk(choice: int, text: str, reason: str | None = None) -> str:
    """A chunk of a chat as vLLM sends it."""
    body = ChatCompletionStreamResponse(
        id="x",
        model="policy",
        choices=[{"index": choice, "delta": {"content": text}, "finish_reason": reason, "stop_reason": None}],
    )
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


def test_after_a_swap_the_chunk_that_ends_a_choice_names_the_versions_and_no_chunk_is_added() -> None:
    spans: list[VersionSpan] = [{"version": 10}, {"version": 20, "from_tokens": [5, 6]}]
    quoting = chunk(0, '"finish_reason":"stop"')
    sent = [chunk(0, "a"), quoting, chunk(0, "", "stop"), chunk(1, "b"), chunk(1, "", "length"), "data: [DONE]\n\n"]
    for cuts in ([6], [3, 3], [2, 1, 1, 1, 1]):
        position, batches = 0, []
        for size in cuts:
            batches.append(sent[position : position + size])
            position += size
        items = items_of(batches, spans)
        events = [event for item in items if isinstance(item, Chunks) for event in item.events]
        assert len(events) == len(sent)
        for before, after in zip(sent, events, strict=True):
            if '"stop_reason"' in before and ("length" in before or before is sent[2]):
                body = json.loads(before.removeprefix("data: "))
                assert json.loads(after.removeprefix("data: ")) == {**body, "policy_versions": spans}
            else:
                assert after == before
        named = [n for n, item in enumerate(items) if isinstance(item, Chunks) and "policy_versions" in str(item)]
        assert all(items[n - 1] == WeightsChanged(WeightsId("run", 20), 2) for n in named)
    assert items_of([list(sent)], spans[:1]) == [Chunks(sent)]
