"""The training core by itself: DeepSpeed in this process, one rank, no Ray."""

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Iterator

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from sampo_ray.config.rows import RowBudget
from sampo_ray.config.run import RunConfig
from sampo_ray.errors import TrainingError
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.run import durable
from sampo_ray.run.buckets import unpack
from sampo_ray.run.version_files import adapters_info, read_version, write_adapters, write_version
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training.batching import Step, assemble, lengths_of, plan_round
from sampo_ray.training.host_copies import HostBuffer
from sampo_ray.training.loading import load_model
from sampo_ray.training.objective import (
    METRICS,
    Draw,
    LossInputs,
    MasterWeights,
    accumulate,
    objective_of,
    train_step,
)
from sampo_ray.training.off_device import OffDevice
from sampo_ray.training.policy import load_policy
from sampo_ray.training.saving import Cast
from sampo_ray.training.statistics import Statistics

from .conftest import random_pairs, with_reference
from .test_losses import without_reference
from .test_saved import assert_same, saved_by, small_files
from .waiting import scaled

pytestmark = pytest.mark.slow
LONG = 50
"""Tokens of a chosen response that makes the losses below go wrong."""


def not_a_number(pairs, settings):
    return torch.where(pairs.chosen_length == LONG, math.nan, 1.0) * pairs.ratios.delta


def infinite(pairs, settings):
    """Its gradient is finite."""
    return torch.where(pairs.chosen_length == LONG, math.inf, 0.0) + pairs.ratios.delta


def steep(pairs, settings):
    """The loss is 0, its gradient is not a number."""
    return torch.where(pairs.chosen_length == LONG, pairs.ratios.delta * 0, pairs.ratios.delta**2 + 1).sqrt()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed insists
        yield
    dist.destroy_process_group()


@pytest.fixture
def pairs(tiny_model):
    """Eight pairs in batches of two; the chosen answer of pair-1 is LONG."""
    made = random_pairs(8, longest=20)
    made[1] = dataclasses.replace(made[1], chosen=np.resize(made[1].chosen, LONG))
    return with_reference(load_policy(tiny_model).requires_grad_(False), made)


TREE = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}}
OURS = ("not_a_number", "infinite", "steep")


def make(tiny_model, loss: str, reduction: str = "sum", lora: dict | None = None, attention="segments", **trainer):
    from sampo_ray.training.learner import Learner

    config = RunConfig.model_validate(
        {
            "model": {"path": str(tiny_model), "lora": lora, "attention": attention},
            "data": {"train": "pairs.jsonl", "max_length": 128},
            "method": {"loss": f"tests.test_learner:{loss}" if loss in OURS else loss, "reduction": reduction},
            "optim": {"batch_size": 2, "learning_rate": 1e-3, "warmup_ratio": 0},
            "trainer": trainer,
            "run": {"dir": "run"},
        }
    )
    checkpointing, lora_config = config.trainer.gradient_checkpointing, config.model.lora
    policy = load_policy(tiny_model, checkpointing, lora=lora_config, attention=config.model.computed)
    learner = Learner(policy, config, torch.device("cpu"))
    learner.begin_round(0, lambda: load_policy(tiny_model).requires_grad_(False))
    return learner


def save(learner, folder) -> None:
    folder.mkdir(exist_ok=True)
    for name, state in learner.snapshot(HostBuffer()).result().items():
        durable.save(state, folder / name)


def plan(pairs) -> list[Step]:
    return list(plan_round(lengths_of(pairs), RowBudget(2, 256), epochs=1, seed=0, round=0))


def masters(learner) -> list[torch.Tensor]:
    return [weight.clone() for _, weight in learner.masters()]


def weights(learner, group=None) -> dict[str, torch.Tensor]:
    """What a version holds, as far as this rank writes it."""
    files = learner.weights(HostBuffer()).own_files(group)
    return {name: tensor.clone() for _, tensors in files for name, tensor in tensors}


def gathered(learner) -> dict[str, torch.Tensor]:
    """The same, each weight gathered from all ranks as the model computes with it."""
    tensors = learner._saved.tensors(Cast(torch.bfloat16), gathered=lambda weight: learner._gathered(weight.parts))
    return {name: tensor.clone() for name, tensor in learner._saved.converted(tensors)}


def test_a_step_learns_and_says_how(alone, tiny_model, pairs):
    learner = make(tiny_model, "sigmoid")
    first, second, *_ = plan(pairs)
    result = learner.optimize(first, pairs, 4)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy still is the reference
    assert {*METRICS, "learning_rate", "grad_norm", "skipped"} == set(result)
    assert result["skipped"] == 0 and result["grad_norm"] > 0 and learner.step == 1
    assert learner.optimize(second, pairs, 4)["margin"] != 0


@pytest.mark.parametrize(
    ("loss", "reduction"), [("sigmoid", "sample"), ("kto_pair", "sum"), ("bco_pair", "sample"), ("tdpo", "sample")]
)
def test_it_does_what_torch_alone_does(alone, tiny_model, pairs, loss, reduction):
    learner, policy = make(tiny_model, loss, reduction), load_policy(tiny_model, gradient_checkpointing=True).train()
    weights, statistics = MasterWeights(policy), learner.statistics
    reference = load_policy(tiny_model).requires_grad_(False).distributions
    for step in plan(pairs)[:2]:
        theirs = learner.optimize(step, pairs, 4)
        inputs = LossInputs(learner.objective, Draw(0, 0, step.epoch), statistics, reference)
        ours, statistics = train_step(policy, weights, step, pairs, inputs, theirs["learning_rate"])
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-5)
        assert statistics == learner.statistics
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        for weight, master, expected in zip(trained, weights.masters, masters(learner), strict=True):
            assert_close(master.detach(), expected, rtol=0, atol=1e-7)
            # The next step starts from equal weights: so small a difference may be rounded to another weight in bf16.
            master.data.copy_(expected)
            weight.data.copy_(expected)


@pytest.mark.parametrize("world", [3, 7])
def test_ranks_that_do_not_divide_a_batch_have_the_loss_and_the_gradients_of_the_whole(tiny_model, pairs, world):
    objective = objective_of(RunConfig.model_validate(TREE).method)
    inputs = LossInputs(objective, Draw(0, 0, 0), Statistics())
    lengths = lengths_of(pairs)

    def step(world: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sums of metrics over the ranks, and gradients as DeepSpeed's mean over them."""
        (step,) = plan_round(lengths, RowBudget(8, 256, world), epochs=1, seed=0, round=0)
        assert sorted(len(rows) for rows in step.rows) == [len(step.rows[0])] * world
        policy = load_policy(tiny_model).float()
        done = [accumulate(policy, rows, pairs, inputs, world / step.pairs)[0] for rows in step.rows]
        trained = [weight.grad / world for weight in policy.parameters() if weight.grad is not None]
        return torch.stack(done).sum(0), trained

    (whole, expected), (ours, gradients) = step(1), step(world)
    assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    for gradient, of_whole in zip(gradients, expected, strict=True):
        assert_close(gradient, of_whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_answers_behind_prompts_of_their_own_are_learned_alike(alone, tiny_model, pairs, zero_stage):
    rows, own = (make(tiny_model, "sigmoid", attention=kind, zero_stage=zero_stage) for kind in ("segments", "own"))
    padded = list(plan_round(lengths_of(pairs), own.config.row_budget, epochs=1, seed=0, round=0))
    assert np.allclose(logprobs(own.score(without_reference(pairs))), logprobs(pairs), atol=0.05)
    for step, same in zip(plan(pairs)[:2], padded[:2], strict=True):
        expected, found = rows.optimize(step, pairs, 4), own.optimize(same, pairs, 4)
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_round_that_begins_has_the_bits_of_its_reference(alone, tiny_model, pairs, zero_stage):
    learner = make(tiny_model, "sigmoid", zero_stage=zero_stage)
    plain = without_reference(pairs)
    assert np.array_equal(logprobs(learner.score(plain)), logprobs(pairs))
    learner.optimize(plan(pairs)[0], pairs, 4)
    assert not np.array_equal(logprobs(learner.score(plain)), logprobs(pairs))
    learner.optimize(plan(pairs)[1], pairs, 4)  # and it still learns


@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, None), (2, {"rank": 4})])
def test_what_is_computed_again_has_the_same_bits(alone, tiny_model, pairs, zero_stage, lora):
    ends = []
    for how in (False, True, "selective"):
        learner = make(tiny_model, "sigmoid", lora=lora, zero_stage=zero_stage, gradient_checkpointing=how)
        metrics = [learner.optimize(step, pairs, 4) for step in plan(pairs)[:2]]
        ends.append((metrics, masters(learner)))
    for metrics, weights in ends[1:]:
        assert metrics == ends[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, ends[0][1], strict=True))


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("loss", ["not_a_number", "infinite", "steep"])
def test_a_step_that_is_not_finite_leaves_no_trace(alone, tiny_model, pairs, loss, zero_stage):
    bad, good, *_ = plan(pairs)
    learner = make(tiny_model, loss, zero_stage=zero_stage)
    before = masters(learner)
    skipped = learner.optimize(bad, pairs, 4)
    assert skipped["skipped"] == 1 and "loss" not in skipped
    assert skipped["reason"] == (
        "all losses were finite, but a gradient was not" if loss == "steep" else "the loss is not finite of pair pair-1"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, masters(learner), strict=True))
    applied = learner.optimize(good, pairs, 4)
    assert applied["skipped"] == 0 and math.isfinite(applied["loss"])

    spared = make(tiny_model, loss, zero_stage=zero_stage)
    assert spared.optimize(good, pairs, 4) == applied
    assert all(torch.equal(a, b) for a, b in zip(masters(spared), masters(learner), strict=True))


def test_too_many_such_steps_end_the_run_and_name_the_pairs(alone, tiny_model, pairs):
    learner = make(tiny_model, "not_a_number", max_skipped=1)
    bad, good, *_ = plan(pairs)
    learner.optimize(bad, pairs, 4)
    learner.optimize(good, pairs, 4)  # what came before it is forgotten
    learner.optimize(bad, pairs, 4)
    with pytest.raises(TrainingError, match=r"2 steps in a row.*max_skipped=1.*pair-1\. .*optim\.learning_rate"):
        learner.optimize(bad, pairs, 4)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        ("sigmoid", "sample"),
        ("ipo", "mean"),
        ("kto_pair", "sample"),
        ("bco_pair", "sum"),
        ("simpo", "mean"),
        ("mix", "sum"),
        ("tdpo", "sample"),
    ],
)
def test_what_was_saved_goes_on_to_the_same_bits(alone, tiny_model, pairs, tmp_path, loss, reduction):
    learner = make(tiny_model, loss, reduction)
    steps = plan(pairs)
    for step in steps[:2]:
        learner.optimize(step, pairs, 4)
    save(learner, tmp_path / "state")
    statistics = learner.statistics
    expected = [learner.optimize(step, pairs, 4) for step in steps[2:]]
    again = make(tiny_model, loss, reduction)
    again.load(tmp_path, "state", 0, 2, statistics)
    assert [again.optimize(step, pairs, 4) for step in steps[2:]] == expected
    assert all(torch.equal(a, b) for a, b in zip(masters(again), masters(learner), strict=True))


def test_what_was_saved_with_weights_beside_their_masters_goes_on_too(alone, tiny_model, pairs, tmp_path):
    """As earlier builds did under ZeRO-2."""
    learner, steps = make(tiny_model, "sigmoid", zero_stage=2), plan(pairs)
    learner.optimize(steps[0], pairs, 4)
    save(learner, tmp_path / "state")
    path = tmp_path / "state" / learner.files[0]
    state = torch.load(path, weights_only=False)
    assert not state["module"].keys() & dict(learner.policy.named_parameters()).keys()
    state["module"] |= learner.policy.state_dict()
    torch.save(state, path)
    expected = learner.optimize(steps[1], pairs, 4)
    again = make(tiny_model, "sigmoid", zero_stage=2)
    again.load(tmp_path, "state", 0, 1, Statistics())
    assert again.optimize(steps[1], pairs, 4) == expected


@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, None), (2, {"rank": 4})])
def test_what_two_ranks_saved_goes_on_with_one(alone, tiny_model, pairs, tmp_path, zero_stage, lora):
    mp.spawn(_two_ranks, (tiny_model, pairs, tmp_path, zero_stage, lora), nprocs=2)
    theirs = torch.load(tmp_path / "masters.pt")
    from sampo_ray.internals.deepspeed import write_universal

    write_universal(tmp_path / "state", tmp_path / "universal")
    learner = make(tiny_model, "sigmoid", lora=lora, zero_stage=zero_stage)
    learner.load(tmp_path, "universal", 0, 2, learner.statistics, universal=True)
    assert all(torch.equal(a, b) for a, b in zip(masters(learner), theirs["saved"], strict=True))
    for step, expected in zip(plan(pairs)[2:], theirs["results"], strict=True):
        result = learner.optimize(step, pairs, 4)
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    # Adam's steps have the size of the learning rate (1e-3), also where a gradient is all but rounding.
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(masters(learner), theirs["end"], strict=True)])
    assert apart.mean() < 2e-5 and apart.max() < 2e-3

    save(learner, tmp_path / "again")
    expected = masters(learner)
    learner = make(tiny_model, "sigmoid", lora=lora, zero_stage=zero_stage)
    learner.load(tmp_path, "again", 0, 4, learner.statistics)  # no trace of the universal one
    assert all(torch.equal(a, b) for a, b in zip(masters(learner), expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "zero_stage", "lora"), [("llama", 2, None), ("mixtral", 3, None), ("llama", 3, {"rank": 4})]
)
def test_two_ranks_copy_a_half_each_of_what_a_version_holds(tmp_path, kind, zero_stage, lora):
    """In files of at most 4 kB. What is copied stays as it was when the training goes on."""
    folder = small_files(kind, tmp_path / "model", attention_dropout=0.0)
    mp.spawn(_two_copy, (folder, tmp_path, zero_stage, lora), nprocs=2)
    found, halves = dict[str, torch.Tensor](), list[int]()
    for rank in range(2):
        copied, nbytes = torch.load(tmp_path / f"copied-{rank}.pt"), (tmp_path / f"bytes-{rank}").read_text()
        assert not found.keys() & copied.keys()
        found |= copied
        halves.append(int(nbytes))
    expected = torch.load(tmp_path / "gathered.pt")
    assert_same(found, expected)
    changing = sum(halves) if lora else sum(each.nbytes for each in expected.values())
    assert max(halves) < 0.6 * changing


def _two_copy(rank, model, folder, zero_stage, lora):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    learner, pairs = (
        make(model, "sigmoid", zero_stage=zero_stage, lora=lora),
        random_pairs(8, longest=20, vocabulary=60),
    )
    group, pairs = dist.new_group(backend="gloo"), learner.score(pairs)
    steps = list(plan_round(lengths_of(pairs), RowBudget(2, 256, 2), epochs=1, seed=0, round=0))
    learner.optimize(steps[0], pairs, 4)
    learner._saved.files = functools.partial(learner._saved.files, nbytes=4_000)
    snapshot, whole = learner.weights(HostBuffer()), gathered(learner)
    assert len(snapshot.files) > 4
    copied = sum(each.nbytes for each in snapshot.copied.result().values())
    learner.optimize(steps[1], pairs, 4)
    files = snapshot.own_files(group)
    torch.save({name: each.clone() for _, tensors in files for name, each in tensors}, folder / f"copied-{rank}.pt")
    (folder / f"bytes-{rank}").write_text(str(copied))
    if rank == 0:
        torch.save(whole, folder / "gathered.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, None), (2, {"rank": 4})])
def test_a_snapshot_writes_no_file_and_fits_in_the_memory_that_was_taken_before_the_first_step(
    alone, tiny_model, pairs, tmp_path, monkeypatch, zero_stage, lora
):
    learner, buffer = make(tiny_model, "sigmoid", lora=lora, zero_stage=zero_stage), HostBuffer()
    learner.warm(buffer)
    taken, folder = buffer.nbytes, tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    learner.optimize(plan(pairs)[0], pairs, 4)
    learner.snapshot(buffer).result()
    assert buffer.nbytes == taken and not list(folder.iterdir())
    trained = [each for each in learner.policy.parameters() if each.requires_grad]
    count = sum(getattr(each, "ds_numel", each.numel()) for each in trained)
    assert 12 * count <= taken < 13 * count, "masters and moments"


@pytest.mark.parametrize(
    ("zero_stage", "settings"),
    [(2, {}), (3, {}), (2, {"lora": {"rank": 4}}), (2, {"offload": "optimizer"}), (3, {"offload": "parameters"})],
)
def test_copies_that_are_made_as_late_as_can_be_are_those_of_their_step(
    tiny_model, pairs, tmp_path, zero_stage, settings
):
    """Beside the passes of the next step, on two ranks. Neither its metrics nor what is learned change."""
    mp.spawn(_late_copies, (tiny_model, pairs, tmp_path, zero_stage, settings), nprocs=2)


def _late_copies(rank, tiny_model, pairs, folder, zero_stage, settings):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    first, second = list(plan_round(lengths_of(pairs), RowBudget(2, 256, 2), epochs=1, seed=0, round=0))[:2]
    seen = []
    for late in (False, True):
        learner, buffers = make(tiny_model, "sigmoid", zero_stage=zero_stage, **settings), (HostBuffer(), HostBuffer())
        results, passes = (
            [learner.optimize(first, pairs, 4)],
            late_until_finished(learner, buffers) if late else [False],
        )
        states, weights = learner.snapshot(buffers[0]), learner.weights(buffers[1]).copied
        if not late:
            learner.finish_copies()
        assert (states.done(), weights.done()) == (not late, not late)
        results.append(learner.optimize(second, pairs, 4))
        assert passes and not any(passes)
        copies = [*tensors_of(states.result()), *weights.result().values()]
        seen.append((results, [each.clone() for each in copies], masters(learner)))
    dist.destroy_process_group()
    (before, *expected), (after, *found) = seen
    assert before == after
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 3 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def late_until_finished(learner, buffers) -> list[bool]:
    """Holds the copies to these buffers back until the learner waits for them; returns whether they were when it went
    backward."""
    may, passes, finish, backward = threading.Event(), list[bool](), learner.finish_copies, learner._engine.backward

    def counted(loss):
        passes.append(may.is_set())
        backward(loss)

    def finished():
        may.set()
        finish()

    learner._engine.backward, learner.finish_copies = counted, finished
    for buffer in buffers:
        buffer._thread.submit(may.wait, scaled(60))
        buffer._wait = lambda: None  # for what is held back
    return passes


def tensors_of(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def _two_ranks(rank, tiny_model, pairs, folder, zero_stage, lora):
    """Trains on the four steps and saves after two; `masters.pt` has the results beyond, and masters then and after."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    learner = make(tiny_model, "sigmoid", lora=lora, zero_stage=zero_stage)
    steps = list(plan_round(lengths_of(pairs), RowBudget(2, 256, 2), epochs=1, seed=0, round=0))
    for step in steps[:2]:
        learner.optimize(step, pairs, 4)
    save(learner, folder / "state")
    saved, results = masters(learner), [learner.optimize(step, pairs, 4) for step in steps[2:]]
    torch.save({"saved": saved, "results": results, "end": masters(learner)}, folder / "masters.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")]
)
def test_where_the_states_are_does_not_change_what_is_learned(alone, tiny_model, pairs, zero_stage, offload):
    one, other = make(tiny_model, "sigmoid"), make(tiny_model, "sigmoid", zero_stage=zero_stage, offload=offload)
    for step in plan(pairs):
        ours, theirs = one.optimize(step, pairs, 4), other.optimize(step, pairs, 4)
        assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    for a, b in zip(masters(one), masters(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adapters_begin_at_the_reference_and_what_is_given_out_has_them_merged_in(alone, tiny_model, pairs, zero_stage):
    learner = make(tiny_model, "sigmoid", lora={"rank": 4}, zero_stage=zero_stage)
    base = load_file(tiny_model / "model.safetensors")
    assert {name: weight.tolist() for name, weight in weights(learner).items()} == {
        k: v.tolist() for k, v in base.items()
    }
    first, *rest = plan(pairs)
    begin = learner.optimize(first, pairs, 4)
    assert (begin["loss"], begin["margin"]) == (pytest.approx(math.log(2), abs=1e-6), 0.0)
    for step in rest:
        learner.optimize(step, pairs, 4)
    merged = dict(learner.masters())
    assert merged.keys() == base.keys()
    moved = {name for name, weight in merged.items() if not torch.equal(weight, base[name].float())}
    assert moved == {name for name in base if "_proj" in name}
    plain, asked = load_policy(tiny_model), without_reference(pairs)
    plain.model.load_state_dict({name: weight.bfloat16() for name, weight in merged.items()}, strict=False)
    ours, theirs = (logprobs(with_reference(policy, asked)) for policy in (learner.policy, plain))
    assert np.abs(ours - theirs).max() < 0.1 < np.abs(ours - logprobs(pairs)).max()


def logprobs(pairs) -> np.ndarray:
    return np.concatenate([pair.chosen_ref for pair in pairs] + [pair.rejected_ref for pair in pairs])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adapters_alone_make_the_merged_weights_of_their_base(alone, tiny_model, pairs, tmp_path, zero_stage):
    from sampo_ray.actors.policy.replica_weights import merging  # imports vLLM

    learner = make(tiny_model, "sigmoid", lora={"rank": 4}, zero_stage=zero_stage)
    for step in plan(pairs):
        learner.optimize(step, pairs, 4)
    lora, folder, base = learner.config.model.lora, str(tmp_path / "000004"), str(tmp_path / "000000")
    info = VersionInfo(version=4, round=0, step=4, adapters=adapters_info(lora, 0))
    ((_, tensors),) = learner.adapters(HostBuffer()).own_files()
    write_adapters(folder, tensors, lora, info)
    (adapters,) = read_version(folder)
    write_adapters(folder, iter(()), lora, info)
    (again,) = read_version(folder)
    assert_close(dict(unpack(again)), dict(unpack(adapters)), msg="what is complete is not written again")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    write_version(base, plain.state_dict().items(), str(tiny_model), VersionInfo(version=0, round=0, step=0))
    buckets = list(read_version(base))
    merge = merging(adapters, info.adapters.scaling)
    merged = {name: weight for bucket in buckets for name, weight in unpack(merge(bucket))}
    expected = weights(learner)
    assert_close({name: merged[name] for name in expected}, expected, rtol=0, atol=0)
    assert_close(gathered(learner), expected, rtol=0, atol=0)
    assert sum(a.nbytes for a in adapters.specs) < sum(spec.nbytes for bucket in buckets for spec in bucket.specs) / 2

    ids, loaded = torch.arange(5, 30)[None], peft.PeftModel.from_pretrained(plain, folder)
    theirs = loaded(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert (plain(ids).logits - theirs).abs().max() > 0.01
    plain.load_state_dict(merged, strict=False)
    assert_close(plain(ids).logits, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("zero_stage", "loss"), [(2, "tdpo"), (3, "sigmoid")])
def test_what_is_given_out_has_the_adapters_of_experts_merged_in(alone, tiny_model, pairs, tmp_path, zero_stage, loss):
    tiny = AutoConfig.from_pretrained(tiny_model)
    sizes = {name: getattr(tiny, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")}
    heads = {"num_attention_heads": tiny.num_attention_heads, "num_key_value_heads": tiny.num_key_value_heads}
    config = Qwen3MoeConfig(**sizes, **heads, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    settings = {"zero_stage": zero_stage, "gradient_checkpointing": True}
    learner = make(tmp_path / "base", loss, lora={"rank": 4, "targets": targets}, **settings)
    before, asked = dict(learner.masters()), without_reference(pairs)
    given = asked if loss == "tdpo" else learner.score(asked)
    begin, *rest = [learner.optimize(step, given, 4) for step in plan(pairs)]
    assert (begin["loss"], begin["margin"]) == (pytest.approx(math.log(2), abs=1e-6), 0.0)
    assert all(result["margin"] != 0 and result["grad_norm"] > 0 for result in rest)
    assert learner.adapter_names is None
    assert_close(gathered(learner), weights(learner), rtol=0, atol=0)
    after = dict(learner.masters())
    moved = {name.split(".")[4] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {"q_proj", "experts"}
    info = VersionInfo(version=4, round=0, step=4)
    write_version(str(tmp_path / "4"), weights(learner).items(), str(tmp_path / "base"), info)
    plain = load_policy(tmp_path / "4")
    ours, theirs = (logprobs(with_reference(policy, asked)) for policy in (learner.policy, plain))
    assert np.abs(ours - theirs).max() < 0.1
    save(learner, tmp_path / "state")
    again = make(tmp_path / "base", loss, lora={"rank": 4, "targets": targets}, **settings)
    again.load(tmp_path, "state", 0, 4, learner.statistics)
    assert all(torch.equal(weight, after[name]) for name, weight in again.masters())


@pytest.mark.parametrize("loss", ["sigmoid", "tdpo"])
def test_adapters_that_were_saved_go_on_to_the_same_bits(alone, tiny_model, pairs, tmp_path, loss):
    learner, steps = make(tiny_model, loss, "sample", lora={"rank": 4}), plan(pairs)
    for step in steps[:2]:
        learner.optimize(step, pairs, 4)
    save(learner, tmp_path / "state")
    expected = [learner.optimize(step, pairs, 4) for step in steps[2:]]
    again = make(tiny_model, loss, "sample", lora={"rank": 4})
    again.load(tmp_path, "state", 0, 2, learner.statistics)
    assert [again.optimize(step, pairs, 4) for step in steps[2:]] == expected
    assert all(torch.equal(a, b) for a, b in zip(masters(again), masters(learner), strict=True))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_reference_beside_the_policy_stays_what_the_round_began_with(alone, tiny_model, pairs, lora):
    learner, asked = make(tiny_model, "tdpo", lora=lora), without_reference(pairs)
    begin, *rest = [learner.optimize(step, asked, 4) for step in plan(pairs)]
    assert (begin["loss"], begin["margin"]) == (pytest.approx(math.log(2), abs=1e-6), 0.0)
    assert all(result["margin"] != 0 and result["grad_norm"] > 0 for result in rest)
    row = assemble(asked)
    states = torch.arange(len(row.tokens))
    ours, theirs = learner._reference(row, states), load_policy(tiny_model).distributions(row, states)
    assert torch.equal(ours.hidden, theirs.hidden) and torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("kind", ["mixtral", "ernie4_5_moe", "glm4_moe", "gpt_neox", "youtu"])
def test_what_is_given_out_is_what_save_pretrained_writes_and_the_reference_is_the_policy(
    alone, tmp_path, kind, zero_stage
):
    folder = small_files(kind, tmp_path / "model", attention_dropout=0.0)
    learner, pairs = make(folder, "sigmoid", zero_stage=zero_stage), random_pairs(4, longest=20, vocabulary=60)
    reference = with_reference(load_policy(folder).requires_grad_(False), pairs)
    assert np.array_equal(logprobs(learner.score(pairs)), logprobs(reference))
    for step in plan(reference):
        assert learner.optimize(step, reference, 2)["skipped"] == 0
    for dtype, given in ((torch.bfloat16, weights(learner).items()), (torch.float16, learner.masters(torch.float16))):
        found = {name: tensor.clone() for name, tensor in given}
        start = saved_by(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path / "saved")
        assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
            name: (each.dtype, each.shape) for name, each in start.items()
        }
        kept = load_model(folder, tensors=found, dtype=dtype)
        assert_same({name: each.clone() for name, each in saved_tensors(kept)}, found)
    assert learner.adapter_names is None, "whole versions are published"
    copies = weights(learner)
    assert_same(copies, gathered(learner))
    again = with_reference(load_policy(folder, tensors=copies).requires_grad_(False), pairs)
    assert np.array_equal(logprobs(learner.score(pairs)), logprobs(again))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_states_that_left_their_device_in_between_go_on_to_the_same_bits(tiny_model, pairs, tmp_path, zero_stage):
    mp.spawn(_leaving_their_device, (tiny_model, pairs, tmp_path, zero_stage), nprocs=2)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["freed"] > 10 * 62_000 and not seen["left"], "weights, gradients, masters and moments"
    assert seen["results"][0] == seen["results"][1]
    assert all(torch.equal(a, b) for a, b in zip(*seen["masters"], strict=True))


def _leaving_their_device(rank, tiny_model, pairs, folder, zero_stage):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    steps = list(plan_round(lengths_of(pairs), RowBudget(2, 256, 2), epochs=1, seed=0, round=0))
    seen = {"results": [], "masters": []}
    for leaves in (False, True):
        learner, off, results = make(tiny_model, "sigmoid", zero_stage=zero_stage), OffDevice(torch.device("cpu")), []
        for step in steps:
            results.append(learner.optimize(step, pairs, 4))
            if leaves:
                seen["freed"] = off.take()
                seen["left"] = sum(p.untyped_storage().nbytes() for p in learner.policy.parameters())
                off.bring_back()
        seen["results"].append(results)
        seen["masters"].append(masters(learner))
    if not rank:
        torch.save(seen, folder / "seen.pt")
    dist.destroy_process_group()
