"""What can be known of a model before its weights are loaded: whether it is supported, and whether training it fits."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from sampo_ray.config.run import load_config
from sampo_ray.config.sections import LoraConfig, TrainerConfig
from sampo_ray.errors import ConfigError
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.learner import deepspeed_config
from sampo_ray.training.memory import AT_ONCE, BUCKET, FETCHED, Shape, check_memory, plan_memory

LLAMA_8B = Shape(
    parameters=8_030_261_248,
    trained=8_030_261_248,
    layers=32,
    hidden=4096,
    intermediate=14336,
    vocabulary=128_256,
    largest=128_256 * 4096,
    file=128_256 * 4096,
)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def meta(kind: str, **fields):
    return on_meta(getattr(transformers, f"{kind}Config")(**SMALL, **fields))


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(ConfigError, match=r"model\.path: not a causal language model"):
        on_meta(transformers.T5Config())


def test_a_shape_is_read_off_a_model_without_weights(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    shape = Shape.of(on_meta(config))
    real = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape.parameters == real.num_parameters()
    assert (shape.layers, shape.vocabulary) == (config.num_hidden_layers, config.vocab_size)


@given(st.integers(1, 64), st.sampled_from([2, 3]), st.integers(16, 16384), st.sampled_from([True, False, "selective"]))
def test_states_are_those_of_zero_and_more_ranks_never_need_more_each(world, stage, tokens, checkpointing):
    trainer = TrainerConfig(workers=world, zero_stage=stage, gradient_checkpointing=checkpointing)
    plan = plan_memory(LLAMA_8B, trainer, tokens, "cuda")
    n = LLAMA_8B.parameters
    assert plan.states == pytest.approx((2 * n if stage == 2 else 2 * n / world) + 16 * n / world, rel=1e-6)
    more = plan_memory(LLAMA_8B, trainer.model_copy(update={"workers": world + 1}), tokens, "cuda")
    assert more.total <= plan.total


def test_adapters_need_gradients_and_optimizer_for_themselves_alone():
    config = transformers.LlamaConfig(vocab_size=512, intermediate_size=128, **SMALL)
    whole, adapted = Shape.of(on_meta(config)), Shape.of(on_meta(config, LoraConfig(rank=4)))
    layer = 4 * (4 * (64 + 64) + 3 * (64 + 128))  # rank times the widths of four and three matrices
    assert adapted.trained == adapted.parameters - whole.parameters == adapted.file == 2 * layer
    plan = plan_memory(adapted, TrainerConfig(), 128, "cuda")
    assert plan.states == 2 * adapted.parameters + 16 * adapted.trained


def test_with_offloading_gradients_are_on_the_device_under_zero_2_alone_and_nothing_is_counted_twice_or_left_out():
    n = LLAMA_8B.parameters // 8
    plans = {
        (stage, offload): plan_memory(
            LLAMA_8B, TrainerConfig(workers=8, zero_stage=stage, offload=offload), 128, "cuda"
        )
        for stage, offload in ((2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters"))
    }
    assert plans[2, "optimizer"].states == plans[2, "none"].states - 12 * n
    assert plans[3, "optimizer"].states == 2 * n and plans[3, "parameters"].states == 0
    # Masters, moments and the gradients that they are stepped with; under ZeRO-3 also those that are accumulated, under
    # ZeRO-2 what is sent back; and the weights.
    staged = 2 * LLAMA_8B.largest
    assert [plan.offloaded for plan in plans.values()] == [0, 18 * n + staged, 0, 20 * n, 22 * n]


def test_what_zero_3_steps_and_gathers_at_once_is_limited():
    def plan(workers, **trainer):
        return plan_memory(LLAMA_8B, TrainerConfig(workers=workers, zero_stage=3, **trainer), 128, "cuda")

    assert plan(4).gathered == 2 * AT_ONCE and plan(1).gathered == 0, "one rank has the weights"
    assert plan(1, offload="parameters").gathered == 2 * AT_ONCE
    alone = TrainerConfig(zero_stage=3, offload="parameters")
    assert plan_memory(LLAMA_8B, alone, 128, "cpu").gathered == 0, "what is offloaded is where it is needed"
    assert plan(4).fetched == 2 * FETCHED and plan(1, offload="parameters").fetched == 0
    assert plan(4).flattened == 4 * AT_ONCE and plan(16).flattened == 4 * (LLAMA_8B.parameters // 16)
    assert plan(4, offload="optimizer").flattened == 0


def test_of_what_is_published_a_rank_copies_whole_files_under_zero_2_and_its_part_under_zero_3():
    n = LLAMA_8B.parameters // 64
    trainers = [TrainerConfig(workers=64, zero_stage=stage) for stage in (2, 3)]
    copies = [plan_memory(LLAMA_8B, trainer, 128, "cuda").copies for trainer in trainers]
    assert copies == [12 * n + 2 * LLAMA_8B.largest, 14 * n]


def test_a_gradient_that_no_bucket_holds_is_copied_whole_and_a_frozen_head_has_none():
    config = transformers.LlamaConfig(vocab_size=2**21, **SMALL)
    whole, adapted = (Shape.of(on_meta(config, lora)) for lora in (None, LoraConfig(rank=4)))
    assert whole.largest == 2**21 * 64
    plan, frozen = (plan_memory(shape, TrainerConfig(), 128, "cuda") for shape in (whole, adapted))
    assert plan.reduced == 6 * whole.largest and plan.buffers == 2 * 2 * BUCKET["cuda"]
    assert plan.head - frozen.head == 2 * whole.largest


def test_adapters_that_would_be_nowhere_are_refused():
    config = transformers.LlamaConfig(vocab_size=512, **SMALL)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: 'query' names no linear layer .* has .*q_proj"):
        on_meta(config, LoraConfig(targets=("q_proj", "query")))
    with pytest.raises(ConfigError, match="'lm_head' names no linear layer"):
        on_meta(config, LoraConfig(targets=("lm_head",)))


def test_a_model_that_can_never_fit_is_refused_with_the_fix():
    gpu = 80 << 30
    with pytest.raises(
        ConfigError, match=r"8\.03B.*workers=2.*zero_stage=2.*74\.8 GiB.*each GPU.*40\.0 GiB.*zero_stage=3"
    ):
        check_memory(LLAMA_8B, TrainerConfig(workers=2), 2048, "cuda", gpu // 2)
    check_memory(LLAMA_8B, TrainerConfig(workers=8), 2048, "cuda", gpu)
    check_memory(LLAMA_8B, TrainerConfig(offload="optimizer", zero_stage=3), 2048, "cuda", gpu // 2)
    with pytest.raises(ConfigError, match=r"44\.9 GiB.*zero_stage=3"):  # ZeRO-2 has the gradients on the device
        check_memory(LLAMA_8B, TrainerConfig(offload="optimizer"), 2048, "cuda", gpu // 2)
    with pytest.raises(ConfigError, match="134.6 GiB"):
        check_memory(LLAMA_8B, TrainerConfig(), 2048, "cpu", 64 << 30)


def test_a_reference_beside_the_policy_is_a_copy_of_the_weights():
    trainer = TrainerConfig(workers=8)
    alone, beside = (plan_memory(LLAMA_8B, trainer, 2048, "cuda", resident=resident) for resident in (False, True))
    assert beside.states - alone.states == 2 * LLAMA_8B.parameters
    with pytest.raises(ConfigError, match=r"40\.0 GiB; use more trainer\.workers, or model\.lora, whose base"):
        check_memory(LLAMA_8B, trainer, 2048, "cuda", 40 << 30, resident=True)


def test_of_widths_that_differ_between_layers_the_widest_counts():
    config = transformers.LlamaConfig(**SMALL)
    model = on_meta(config)
    plain = Shape.of(model)
    model.config.__dict__["intermediate_size"] = [64, 4 * plain.intermediate]
    assert Shape.of(model).intermediate == 4 * plain.intermediate


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_gradients_are_reduced_beside_the_backward_pass_on_gpus_and_in_small_buckets_on_cpus(offload):
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}, "trainer": {"offload": offload}}
    settings = {kind: deepspeed_config(load_config(tree), torch.device(kind)) for kind in ("cpu", "cuda")}
    zero = {kind: settings[kind].pop("zero_optimization") for kind in settings}
    assert settings["cpu"] == settings["cuda"]
    assert not zero["cpu"]["overlap_comm"] and zero["cpu"]["reduce_bucket_size"] == 2**24
    assert zero["cuda"]["overlap_comm"] and zero["cuda"]["reduce_bucket_size"] == 2**26
    pinned = {kind: each["offload_optimizer"]["pin_memory"] for kind, each in zero.items() if offload != "none"}
    assert pinned in ({}, {"cpu": False, "cuda": True})
