"""What the benchmarks share; what they measure needs a quiet machine and is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _measure  # noqa: E402
import _rig  # noqa: E402

from sampo_ray.data.chat import ChatFormat  # noqa: E402
from tests.waiting import scaled  # noqa: E402


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


WITHOUT = """
import runpy, sys
class Hides:
    def __init__(self, finder):
        self._finder = finder
    def __getattr__(self, name):
        return getattr(self._finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("ray", "vllm", "pydantic", "deepspeed", "peft", "rich", "pyarrow"):
            return self._finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hides, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_measures_a_gpu_needs_torch_and_transformers_alone_and_keeps_what_sections_found() -> None:
    how = ["--device", "cpu", "--shape", "tiny", "--large", "tiny", "--longest", "512", "--seconds", "0.1"]
    command = [sys.executable, "-c", WITHOUT, str(BENCHMARKS / "gpu.py"), *how]
    env = os.environ | {"PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=scaled(200))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (attention,), results = found["results"]["attention"], found["results"]
    assert 0.5 < attention["segments"]["logprobs"] < 2 and 0.5 < attention["segments"]["gradients"] < 2
    assert results["crossover"] and results["step"][0]["pairs_per_s"] > 0 and results["optimizer"]
    for name, missing in (("lora", "peft"), ("overlap", "deepspeed")):
        (failed,) = results[name]
        assert missing in failed["error"], "a section that fails says why, and loses no other's results"
    assert {"segments_logprobs_error", "step_pairs_per_s", "step_utilisation"} <= found["ratios"].keys()
