"""What fits on one GPU: a training rank and a policy engine, side by side or by turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.gpu_memory import ASLEEP, MOST, RUNTIME, Needs, by_turns, side_by_side
from sampo_ray.config.rows import default_row
from sampo_ray.config.sections import TrainerConfig
from sampo_ray.training.memory import Shape, plan_memory

LLAMA = {
    # parameters, layers, hidden, intermediate, key-value heads x their width
    "1B": (1_235_814_400, 16, 2048, 8192, 8 * 64),
    "3B": (3_212_749_824, 28, 3072, 8192, 8 * 128),
    "8B": (8_030_261_248, 32, 4096, 14336, 8 * 128),
}
GIB = 1 << 30


def needs(size: str, lora: bool, offload: str, max_length: int, sharded: bool = False) -> Needs:
    parameters, layers, hidden, intermediate, kv = LLAMA[size]
    adapters = 16 * layers * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + intermediate))
    trained, largest = (adapters, 16 * intermediate) if lora else (parameters, 128_256 * hidden)
    file = trained if lora else largest
    shape = Shape(parameters + lora * adapters, trained, layers, hidden, intermediate, 128_256, largest, file)
    stage = 3 if sharded else 2
    plan = plan_memory(
        shape, TrainerConfig(workers=1, offload=offload, zero_stage=stage), default_row(max_length), "cuda"
    )
    return Needs(plan.total, 2 * parameters, 2 * 2 * layers * kv, max_length)


@pytest.mark.parametrize(
    ("gpu", "size", "how", "fits"),
    [
        (24, "1B", "full", "no"),
        (24, "1B", "offloaded", "side by side"),
        (24, "1B", "lora", "side by side"),
        (24, "3B", "full", "no"),
        (24, "3B", "offloaded", "no"),  # the gradients stay on the device
        (24, "3B", "offloaded, ZeRO-3", "side by side"),
        (24, "3B", "lora", "side by side"),
        (24, "8B", "full", "no"),
        (24, "8B", "lora", "by turns"),
        (40, "1B", "full", "side by side"),
        (40, "3B", "full", "no"),
        (40, "3B", "offloaded", "side by side"),
        (40, "8B", "full", "no"),
        (40, "8B", "lora", "side by side"),
        (80, "1B", "full", "side by side"),
        (80, "3B", "full", "side by side"),
        (80, "8B", "full", "no"),
        (40, "8B", "offloaded, ZeRO-3", "side by side"),
        (80, "8B", "offloaded", "side by side"),
        (80, "8B", "lora", "side by side"),
    ],
)
def test_what_fits_on_one_gpu_with_answers_of_2048_tokens(gpu: int, size: str, how: str, fits: str) -> None:
    offloads, sharded = how.startswith("offloaded"), how.endswith("ZeRO-3")
    need = needs(size, how == "lora", "optimizer" if offloads else "none", 2048, sharded)
    memory = int(0.98 * gpu * GIB)  # a GPU has a little less than it is called
    beside, turns = side_by_side(need, memory), by_turns(need, memory)
    assert ("side by side" if beside.fit else "by turns" if turns.fit else "no") == fits
    if fits == "no":
        assert ("trainer.zero_stage=3" if offloads else "trainer.offload=optimizer") in turns.advice(
            offloads, how == "lora", sharded
        )


def test_long_answers_of_an_8b_model_do_not_fit_on_24_gb_and_the_fix_is_said() -> None:
    shares = by_turns(needs("8B", True, "none", 8192), int(0.98 * 24 * GIB))
    assert shares.rank_lacks and not shares.engine_lacks
    assert shares.advice(False, True) == (
        "trainer.offload=optimizer, a smaller data.max_length or a smaller model.path"
    )


BYTES = st.integers(0, 200 * GIB)


@given(
    st.builds(Needs, BYTES, BYTES, st.integers(0, 1 << 20), st.integers(1, 32768), BYTES), st.integers(GIB, 96 * GIB)
)
def test_what_is_given_out_is_never_more_than_there_is(need: Needs, gpu: int) -> None:
    beside, turns = side_by_side(need, gpu), by_turns(need, gpu)
    if beside.fit:
        assert beside.utilization * gpu + need.rank + need.others + RUNTIME <= gpu
        assert (
            turns.fit or need.rank > gpu - 2 * RUNTIME - ASLEEP - need.others
        )  # an engine that sleeps keeps something
    if turns.fit:
        assert need.rank + ASLEEP + need.others + RUNTIME <= gpu
        assert turns.utilization * gpu + need.others + RUNTIME <= gpu
    for shares in (beside, turns):
        assert 0 <= shares.utilization <= MOST
        assert not shares.fit or need.engine <= (shares.utilization + 0.01) * gpu + 1
