"""What the benchmarks share; what they measure needs a quiet machine and is not tested."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _measure  # noqa: E402
import _rig  # noqa: E402

from sampo_ray.data.chat import ChatFormat  # noqa: E402


def test_the_last_line_of_a_benchmark_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    _measure.report("rollout", {"ratio": [1.1, 0.9, 1.0]}, {"ratio": _measure.Target(at_least=0.95)})
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found) == ["benchmark", "ratios", "spread", "machine", "versions"]
    assert found["ratios"] == {"ratio": 1.0}
    assert found["spread"] == {"ratio": [0.9, 1.1]}
    assert any("met" in line for line in table)


def test_a_target_is_met_from_the_right_side() -> None:
    assert _measure.Target(at_least=0.95).verdict(0.94).endswith("missed")
    assert _measure.Target(at_most=1.1).verdict(1.2).endswith("missed")
    assert _measure.Target(at_most=1.1).verdict(1.1).endswith("met")


def test_sides_take_turns_and_each_begins_as_often() -> None:
    order: list[str] = []
    sides = {name: lambda turn, name=name: order.append(name) or turn for name in ("a", "b")}
    assert _measure.take_turns(sides, 4) == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}
    assert "".join(order) == "abbaabba"


def test_percentiles_are_values_that_were_measured() -> None:
    assert _measure.percentile(range(1, 101), 0.95) == 95
    assert _measure.percentile([3.0], 0.95) == 3.0


def test_prompts_differ() -> None:
    assert len({json.dumps(_rig.messages(index)) for index in range(3000)}) == 3000


def test_prompts_share_more_than_a_block_of_the_prefix_cache_and_leave_room_for_an_answer(tmp_path: Path) -> None:
    folder, _ = _rig.model_folder(None, tmp_path)
    chat = ChatFormat.load(folder, "llama3")
    first, second = (chat.prompt_ids(_rig.messages(index)) for index in (0, 1999))
    shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert 128 < shared < len(first) < _rig.CONTEXT - 400
