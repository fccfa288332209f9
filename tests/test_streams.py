"""Random streams: fixed values, since a run that is resumed must draw what it drew before."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sampo_ray.config.rows import RowBudget
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import LoraConfig
from sampo_ray.loop.rounds import prompts_of
from sampo_ray.training.batching import plan_round
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.reduction import MaskKey, sampled_positions
from sampo_ray.training.streams import Stream, adapter_seed, completion_seed, pair_number, rollout_seed
from tests.waiting import scaled

NUMBERS = {"seed": 7, "round": 2, "epoch": 1, "cycle": 2, "pair": pair_number("pair-é"), "source": 1, "start": 512}
ORDERS = {
    Stream.PROMPT_ORDER: [7, 6, 1, 3, 0, 2, 4, 5],
    Stream.PAIR_ORDER: [3, 1, 2, 5, 6, 7, 0, 4],
    Stream.SPLIT: [6, 3, 1, 0, 2, 4, 7, 5],
    Stream.FEEDBACK_ORDER: [1, 7, 4, 3, 0, 6, 2, 5],
    Stream.EPOCH_ORDER: [2, 4, 1, 5, 6, 3, 0, 7],
    Stream.POLICY_MASK: [0, 5, 1, 2, 6, 3, 7, 4],
    Stream.REFERENCE_MASK: [7, 4, 1, 3, 6, 5, 2, 0],
    Stream.MIX: [6, 4, 3, 5, 2, 7, 0, 1],
    Stream.PROBE: [3, 7, 1, 6, 0, 5, 4, 2],
}


@pytest.mark.parametrize("stream", Stream)
def test_each_stream_draws_what_it_always_drew(stream):
    assert stream.generator(**NUMBERS).permutation(8).tolist() == ORDERS[stream]


def test_a_stream_without_one_of_its_numbers_is_an_error():
    with pytest.raises(KeyError, match="epoch"):
        Stream.EPOCH_ORDER.generator(seed=7, round=2)


def test_masks_keep_their_tokens():
    key, lengths = MaskKey(7, 2, 1, "pair-é"), (9, 4)
    policy = sampled_positions(key, *lengths)
    reference = sampled_positions(key, *lengths, Stream.REFERENCE_MASK)
    assert (policy.chosen.tolist(), policy.rejected.tolist()) == ([1, 3, 5, 8], [0, 1, 2, 3])
    assert (reference.chosen.tolist(), reference.rejected.tolist()) == ([0, 1, 6, 7], [0, 1, 2, 3])


def test_the_epochs_of_a_round_keep_their_orders():
    steps = plan_round(np.full((8, 3), 4), RowBudget(4, 100), epochs=3, seed=7, round=2)
    rows = [row.tolist() for step in steps for rank in step.rows for row in rank]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [2, 4, 1, 5], [6, 3, 0, 7], [1, 7, 4, 3], [0, 6, 2, 5]]


def test_online_rounds_keep_their_prompts():
    tree = {"run": {"dir": "r", "seed": 7}, "model": {"path": "m"}, "data": {"prompts": "d.jsonl"}}
    tree |= {
        "rounds": {"mode": "online", "count": 3},
        "rollout": {"prompts": 6},
        "reward": {"function": "rewards:length"},
    }
    config = load_config(tree)
    found = [prompts_of(config, index, 8).tolist() for index in range(3)]
    assert found == [[0, 6, 7, 2, 4, 5], [1, 3, 2, 4, 0, 6], [7, 5, 3, 1, 6, 0]]


@given(st.integers(1, 40), st.none() | st.integers(1, 60), st.integers(1, 8))
def test_no_prompt_is_twice_in_a_round_and_all_take_turns(total, prompts, count):
    tree = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"prompts": "d.jsonl"}}
    tree |= {"rounds": {"mode": "online", "count": count}, "reward": {"function": "rewards:length"}}
    config = load_config(tree | {"rollout": {"prompts": prompts}})
    used = [prompts_of(config, index, total).tolist() for index in range(count)]
    wanted = min(prompts or -(-total // count), total)
    assert all(len(set(each)) == len(each) == wanted for each in used)
    times = np.bincount(np.concatenate(used), minlength=total)
    assert times.max() - times.min() <= 1


def test_rollouts_and_completions_keep_their_seeds():
    assert rollout_seed(7, 2) == 7_000_023
    assert completion_seed(rollout_seed(7, 2), "prompt-1", 3) == 3851496905856544454


def test_adapters_begin_with_the_same_bits():
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    add_adapters(model, LoraConfig(rank=1, targets=("q_proj",)), adapter_seed(7, 2))
    [a] = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
    expected = [0.013626919128000736, -0.10834416002035141, -0.03701525926589966, 0.0930238664150238]
    expected += [0.13770610094070435, 0.22731362283229828, 0.29070940613746643, 0.16369684040546417]
    assert torch.equal(a, torch.tensor([expected]))


def test_streams_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import sampo_ray.training.streams"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=scaled(60))
