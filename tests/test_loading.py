"""Loading a model without its weights, and then all of these, or a rank's share, against what transformers loads."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sampo_ray.actors.ranks.rank import threads_of
from sampo_ray.config.rows import RowBudget
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import LoraConfig
from sampo_ray.training.batching import lengths_of, plan_round
from sampo_ray.training.loading import in_training_dtype, load_model
from sampo_ray.training.noise import without_noise
from sampo_ray.training.policy import load_policy, policy_on, policy_without_weights

from .conftest import random_pairs, with_reference
from .test_saved import small_files

KINDS = [
    "llama",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "ernie4_5_moe",
    "glm4_moe",
    "deepseek_v3",
    "youtu",
    "gemma3_text",
    "opt",
]
"""Plain, tied, renamed, experts in one tensor, weights kept in fp32, rows set after loading, several rotary tables."""


def as_transformers_loads(folder: Path) -> PreTrainedModel:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    return AutoModelForCausalLM.from_pretrained(folder, config=without_noise(config), dtype=torch.bfloat16)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, shared ones under each of their names."""
    return dict(
        itertools.chain(*(each(remove_duplicate=False) for each in (module.named_parameters, module.named_buffers)))
    )


def run_config(model: Path, lora: dict | None, trainer: dict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model), "lora": lora, "attention": "own"},
            "data": {"train": "pairs.jsonl", "max_length": 128},
            "optim": {"batch_size": 4, "learning_rate": 1e-3, "warmup_ratio": 0},
            "trainer": trainer,
            "run": {"dir": "run"},
        }
    )


def assert_same_bits(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
        assert torch.equal(ours[name], tensor), name
    ours_tied, theirs_tied = ([*dict.fromkeys(map(id, each.values()))] for each in (ours, theirs))
    assert len(ours_tied) == len(theirs_tied)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_as_transformers_loads_it(kind, tmp_path):
    folder = small_files(kind, tmp_path)
    assert_same_bits(load_model(folder), as_transformers_loads(folder))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mixtral", "ernie4_5_moe", "deepseek_v3"])
def test_the_shares_of_all_ranks_are_the_weights_as_they_were(kind, targets, tmp_path):
    world, lora = 3, targets and LoraConfig(rank=4, targets=targets)
    model = as_transformers_loads(small_files(kind, tmp_path))
    in_training_dtype(model)
    wanted = policy_on(model, True, lora, 3, "own")
    parts = dict[str, list[torch.Tensor]]()
    for rank in range(world):
        policy, weights = policy_without_weights(tmp_path, True, lora, 3, "own")
        share = weights.shares(policy.model, rank, world)
        for name, parameter in policy.named_parameters():
            parts.setdefault(name, []).append(share(parameter))
        buffers = dict(policy.named_buffers())
        assert buffers.keys() == dict(wanted.named_buffers()).keys()
        assert all(torch.equal(buffers[name], each) for name, each in wanted.named_buffers())
    found = dict(wanted.named_parameters())
    assert parts.keys() == found.keys()
    for name, parameter in found.items():
        assert torch.equal(torch.cat(parts[name]), parameter.detach().flatten()), name
    assert_same_bits(load_policy(tmp_path, True, "cpu", lora, 3, "own"), wanted)


def test_a_rank_reads_its_share_of_the_files_and_no_more(tmp_path, monkeypatch):
    small_files("llama", tmp_path)
    read, size = list[int](), sum(each.nbytes for each in load_file(tmp_path / "model.safetensors").values())
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *asked: read.append(preadv(*asked)) or read[-1])
    policy, weights = policy_without_weights(tmp_path, attention="own")
    share = weights.shares(policy.model, 1, 4)
    for parameter in policy.parameters():
        share(parameter)
    assert size // 8 < sum(read) <= size // 4


def test_files_that_have_a_tied_weight_twice_tie_it_only_if_it_is_the_same(tmp_path):
    small_files("llama", tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for head in (tensors["model.embed_tokens.weight"].clone(), tensors["model.embed_tokens.weight"] + 1):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
        found = load_model(tmp_path)
        assert_same_bits(found, as_transformers_loads(tmp_path))
        same = torch.equal(head, tensors["model.embed_tokens.weight"])
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == same


def test_a_rank_has_its_share_of_the_cores_that_its_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    limit = tmp_path / "cpu.max"
    assert threads_of(8, limit) == 12
    for said, threads in (("max 100000", 12), ("3200000 100000", 4), ("50000 100000", 1)):
        limit.write_text(said)
        assert threads_of(8, limit) == threads


@pytest.mark.slow
def test_two_ranks_that_load_their_shares_train_as_if_each_had_loaded_all(tmp_path):
    for kind in (each for each, *_ in SHARDED):
        if not (tmp_path / kind).exists():
            small_files(kind, tmp_path / kind, attention_dropout=0.0)
    mp.spawn(_compare_shards, (tmp_path,), nprocs=2)


SHARDED = [("llama", None, "parameters"), ("gpt2", None, "none"), ("llama", {"rank": 4}, "optimizer")]
"""Kind of model, adapters, and what is offloaded."""


def _compare_shards(rank: int, folder: Path) -> None:
    from sampo_ray.training.learner import Learner, load_trained

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for kind, lora, offload in SHARDED:
        config = run_config(folder / kind, lora, {"zero_stage": 3, "workers": 2, "offload": offload})
        adapters, cpu = config.model.lora, torch.device("cpu")
        model = as_transformers_loads(folder / kind)
        in_training_dtype(model)
        whole = policy_on(model, True, adapters, 5, config.model.computed)
        theirs = Learner(whole.in_batches(config.batches_answers), config, cpu)
        ours = Learner(load_trained(config, folder / kind, 5, cpu), config, cpu)
        wanted, found = (list(each.policy.named_parameters()) for each in (theirs, ours))
        assert [name for name, _ in found] == [name for name, _ in wanted]
        for (name, one), (_, other) in zip(wanted, found, strict=True):
            assert (one.ds_shape, one.ds_numel, one.requires_grad) == (
                other.ds_shape,
                other.ds_numel,
                other.requires_grad,
            )
            assert (one.ds_persist, one.ds_numel_aligned) == (other.ds_persist, other.ds_numel_aligned)
            filled = min(one.ds_tensor.ds_numel, one.ds_numel - rank * one.ds_tensor.ds_numel)
            assert torch.equal(one.ds_tensor[:filled], other.ds_tensor[:filled]), (kind, name)
            assert one.ds_tensor.dtype == other.ds_tensor.dtype and len(one.ds_tensor) == len(other.ds_tensor)
        buffers = dict(ours.policy.named_buffers())
        assert all(torch.equal(buffers[name], each) for name, each in theirs.policy.named_buffers())
        pairs = with_reference(
            load_policy(folder / kind, attention=config.model.computed), random_pairs(4, longest=20, vocabulary=60)
        )
        (step, *_) = plan_round(lengths_of(pairs), RowBudget(4, 256, world=2), epochs=1, seed=0, round=0)
        for learner in (theirs, ours):
            learner.begin_round(0)
        assert theirs.optimize(step, pairs, 1) == ours.optimize(step, pairs, 1), (kind, lora, offload)
        for (name, one), (_, other) in zip(theirs.masters(), ours.masters(), strict=True):
            assert torch.equal(one, other), name
    dist.destroy_process_group()
