"""Constraints on answers: how they are tried in a copy of the process, and what the engine's compiler takes."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from sampo_ray.actors.policy.constraints import Constraints, Trial, TrialTakesTooLong, in_a_copy
from sampo_ray.internals.vllm import check_constraints, constraint_trial


def fail(message: str) -> None:
    raise ValueError(message)


def busy() -> None:
    while True:
        pass


def test_work_in_a_copy_leaves_nothing_but_its_error() -> None:
    done: list[int] = []
    assert in_a_copy(lambda: done.append(1), cpu_s=5) == ""
    assert in_a_copy(lambda: fail("no \u00e9"), cpu_s=5) == "no \u00e9"
    assert in_a_copy(lambda: fail(""), cpu_s=5) == "ValueError"
    assert done == []


@pytest.mark.parametrize("work", [busy, lambda: bytearray(1 << 40)], ids=["computes", "allocates"])
def test_a_copy_that_uses_up_its_limits_is_ended(work: Callable[[], object]) -> None:
    with pytest.raises(TrialTakesTooLong):
        in_a_copy(work, cpu_s=1)


def test_a_trial_that_does_not_end_in_time_says_nothing_of_a_constraint() -> None:
    constraint, times = StructuredOutputsParams(json={}), [60.0]
    constraints = Constraints(lambda: lambda _: time.sleep(times[-1]), wall_s=0.5)
    with pytest.raises(VLLMValidationError, match="were not tried within 0 s; ask again"):
        asyncio.run(constraints.check(constraint))
    times.append(0.0)
    constraints._wall_s = 120.0
    asyncio.run(constraints.check(constraint))


def test_a_verdict_is_found_once_and_a_slow_one_says_what_to_change() -> None:
    made: list[int] = []

    def make() -> Trial:
        made.append(1)
        return lambda constraint: (
            busy() if constraint.json == {"slow": 1} else fail("[10:00:00] /a/b.cc:7: No field x\n")
        )

    async def refusals() -> list[str]:
        constraints, found = Constraints(make, cpu_s=1), []
        for schema in ({"slow": 1}, {"wrong": 1}, {"slow": 1}):
            begun = time.process_time()
            with pytest.raises(VLLMValidationError) as refused:
                await constraints.check(StructuredOutputsParams(json=schema))
            found.append(str(refused.value))
            assert time.process_time() - begun < 1, "the work is the copy's"
        return found

    slow, wrong, again = asyncio.run(refusals())
    assert "take more than 1 s to compile; use fewer patterns" in slow and slow == again
    assert wrong == "the answer's JSON schema, choices or tools: No field x"
    assert made == [1]


def test_the_engine_gets_no_constraint_before_it_was_checked() -> None:
    asked: list[Any] = []

    class Engine:
        async def generate(self, prompt: str, params: SamplingParams, request_id: str) -> Any:
            asked.append(prompt)
            yield prompt

    async def check(constraint: StructuredOutputsParams) -> None:
        if constraint.choice == ["no"]:
            raise VLLMValidationError("refused")

    async def ask(prompt: str, **params: Any) -> list[Any]:
        return [item async for item in engine.generate(prompt, SamplingParams(**params), request_id="1")]

    engine: Any = Engine()
    check_constraints(engine, check)
    assert asyncio.run(ask("plain")) == ["plain"]
    assert asyncio.run(ask("right", structured_outputs=StructuredOutputsParams(choice=["yes"]))) == ["right"]
    with pytest.raises(VLLMValidationError):
        asyncio.run(ask("wrong", structured_outputs=StructuredOutputsParams(choice=["no"])))
    assert asked == ["plain", "right"]


@pytest.fixture(scope="module")
def trial(tiny_model: Path) -> Trial:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(tiny_model), structured_outputs_config={"backend": "xgrammar"}, max_model_len=512)
    return constraint_trial(SimpleNamespace(vllm_config=args.create_engine_config()))  # type: ignore[arg-type]


TREE = {"type": "object", "properties": {"inner": {"type": "array", "items": {"$ref": "#"}}}}


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}},
        {"json": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[a-f0-9]+$"}}}},
        {"json": TREE},
        {"json": {"$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}},
        {"json": '{"type": "string", "maxLength": 5}'},
        {"json_object": True},
        {"choice": ["yes", "no"]},
    ],
)
def test_what_the_engines_compiler_takes_is_taken(trial: Trial, constraint: dict[str, Any]) -> None:
    asyncio.run(Constraints(lambda: trial).check(StructuredOutputsParams(**constraint)))


LOOP = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "no answer satisfies them"),
        (LOOP, "no answer satisfies them"),
        ({"type": "string", "minLength": -1}, "Invalid repetition range"),
        ({"type": "string", "pattern": "(["}, "Regex parsing error"),
        ({"$ref": "#/nowhere"}, "Cannot find field nowhere"),
        ({"type": "integer", "multipleOf": 7}, "not supported"),
    ],
)
def test_what_it_would_fail_on_is_refused_with_its_reason(trial: Trial, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(VLLMValidationError, match=reason) as refused:
        asyncio.run(Constraints(lambda: trial).check(StructuredOutputsParams(json=schema)))
    assert ".cc:" not in str(refused.value)
