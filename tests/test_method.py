"""The method: positions, reductions, losses, log-probs and the objective, against independent computations."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sampo_ray.batching import assemble
from sampo_ray.config import MethodConfig
from sampo_ray.logprobs import token_logprobs
from sampo_ray.losses import LOSSES, LossSettings
from sampo_ray.objective import METRICS, Draw, row_losses
from sampo_ray.policy import load_policy, pair_logprobs
from sampo_ray.reduction import REDUCTIONS, MaskKey, SequenceLogRatios, all_positions, reduce_pairs, sampled_positions
from tests.conftest import random_pairs

DRAW = Draw(seed=1, round=0, epoch=0)
lengths = st.integers(1, 300)
keys = st.builds(MaskKey, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.text(max_size=8))


@given(keys, lengths, lengths)
def test_a_sampled_mask_keeps_exactly_as_many_tokens_as_the_shorter_response_has(key, chosen, rejected):
    kept = sampled_positions(key, chosen, rejected)
    for positions, length in ((kept.chosen, chosen), (kept.rejected, rejected)):
        assert len(positions) == min(chosen, rejected)
        assert len(set(positions)) == len(positions)
        assert positions.min() >= 0 and positions.max() < length
        assert (np.diff(positions) > 0).all()


@given(keys, lengths, lengths)
def test_a_mask_is_a_function_of_its_key_alone(key, chosen, rejected):
    again = MaskKey(key.seed, key.round, key.epoch, key.pair)
    first, second = sampled_positions(key, chosen, rejected), sampled_positions(again, chosen, rejected)
    assert np.array_equal(first.chosen, second.chosen) and np.array_equal(first.rejected, second.rejected)


@pytest.mark.parametrize("changed", ["seed", "round", "epoch", "pair"])
def test_each_part_of_the_key_changes_the_mask(changed):
    base = {"seed": 1, "round": 2, "epoch": 3, "pair": "a"}
    other = base | {changed: "b" if changed == "pair" else 9}
    masks = [sampled_positions(MaskKey(**key), 200, 100).chosen for key in (base, other)]
    assert not np.array_equal(*masks)


def test_the_independent_draw_differs_from_the_policy_s():
    key = MaskKey(0, 0, 0, "a")
    assert not np.array_equal(
        sampled_positions(key, 200, 100).chosen, sampled_positions(key, 200, 100, stream=1).chosen
    )


def test_expected_sampled_sum_is_the_scaled_sum():
    ratios = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = [ratios[sampled_positions(MaskKey(0, 0, 0, str(i)), 60, 20).chosen].sum() for i in range(4000)]
    error = torch.stack(draws).std() / math.sqrt(len(draws))
    assert abs(torch.stack(draws).mean() - ratios.sum() * 20 / 60) < 4 * error


def naive_reduction(name, w, r, positions):
    if name == "sum":
        return w.sum(), r.sum()
    if name == "average":
        scale = (len(w) + len(r)) / 2
        return w.mean() * scale, r.mean() * scale
    if name == "sample":
        return sum(w[i] for i in positions.chosen), sum(r[i] for i in positions.rejected)
    kept = min(len(w), len(r))
    return w.sort(descending=True)[0][:kept].sum(), r.sort(descending=True)[0][:kept].sum()


@pytest.mark.parametrize("name", REDUCTIONS)
@given(lengths, lengths, st.integers(0, 1000))
@settings(max_examples=30)
def test_reductions_match_their_definition(name, length_w, length_l, seed):
    rng = torch.Generator().manual_seed(seed)
    w, r = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (length_w, length_l))
    reduction, key = REDUCTIONS[name], MaskKey(0, 0, 0, str(seed))
    at = reduction.positions(key, length_w, length_l)
    got = reduce_pairs(reduction, [w[at.chosen]], [r[at.rejected]], [(length_w, length_l)])
    expected = naive_reduction(name, w, r, sampled_positions(key, length_w, length_l))
    assert torch.allclose(torch.stack([got.chosen[0], got.rejected[0]]), torch.stack(list(expected)), atol=1e-9)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_does_not_depend_on_the_order_of_the_batch(name):
    rng = torch.Generator().manual_seed(3)
    ws, rs = ([torch.randn(5 + 3 * i, generator=rng) for i in range(6)] for _ in range(2))
    sizes = [(len(w), len(r)) for w, r in zip(ws, rs, strict=True)]
    forward = reduce_pairs(REDUCTIONS[name], ws, rs, sizes)
    backward = reduce_pairs(REDUCTIONS[name], ws[::-1], rs[::-1], sizes[::-1])
    assert torch.equal(forward.delta, backward.delta.flip(0))


def ratios(delta_w, delta_l, tokens=4.0):
    w, r = torch.tensor(delta_w, dtype=torch.float64), torch.tensor(delta_l, dtype=torch.float64)
    return SequenceLogRatios(w, r, torch.full_like(w, tokens), torch.full_like(r, tokens))


def test_the_sigmoid_loss_is_dpo_s():
    loss = LOSSES["sigmoid"].function(ratios([3.0, -1.0], [1.0, 4.0]), LossSettings(beta=0.5))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.5))])


def test_label_smoothing_mixes_both_labels():
    loss = LOSSES["sigmoid"].function(ratios([2.0], [0.0]), LossSettings(beta=1.0, label_smoothing=0.2))
    assert loss.item() == pytest.approx(0.8 * math.log1p(math.exp(-2)) + 0.2 * math.log1p(math.exp(2)))


def test_ipo_regresses_the_mean_margin_to_its_target():
    loss = LOSSES["ipo"].function(ratios([8.0], [4.0]), LossSettings(beta=0.1))
    assert loss.item() == pytest.approx((8 / 4 - 4 / 4 - 5.0) ** 2)


@given(st.integers(1, 150), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_token_logprobs_and_gradients_match_log_softmax_in_fp64(tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (tokens, 50))
    targets = torch.randint(50, (tokens,), generator=rng)
    upstream = torch.randn(tokens, generator=rng, dtype=torch.float64)
    results = []
    for tiled in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        naive = (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        out = token_logprobs(h, w, targets, rows=16) if tiled else naive
        (out * upstream).sum().backward()
        results.append((out, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_token_s_logprob_does_not_depend_on_how_many_are_asked_for():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=rng).bfloat16()
    weight = torch.randn(512, 64, generator=rng).bfloat16()
    targets = torch.randint(512, (300,), generator=rng)
    everything = token_logprobs(hidden, weight, targets)
    some = torch.tensor([0, 3, 64, 65, 130, 299])
    assert torch.equal(token_logprobs(hidden[some], weight, targets[some]), everything[some])


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(tiny_model)


def with_reference(policy, pairs: pa.Table) -> pa.Table:
    """Adds the policy's own log-probs of each pair, scored alone, as the reference."""
    columns: dict[str, list] = {"chosen_ref": [], "rejected_ref": []}
    with torch.no_grad():
        for i in range(len(pairs)):
            row = assemble(pairs.slice(i, 1))
            everything = [all_positions(None, row.segments[0].chosen, row.segments[0].rejected)]
            chosen, rejected = pair_logprobs(policy, row, everything)
            columns["chosen_ref"].append(chosen[0].numpy())
            columns["rejected_ref"].append(rejected[0].numpy())
    for name, values in columns.items():
        pairs = pairs.append_column(name, pa.array(values, pa.list_(pa.float32())))
    return pairs


def test_a_row_s_logprobs_are_those_of_the_plain_model(policy, tiny_model):
    pairs = random_pairs(5)
    row = assemble(pairs)
    everything = [all_positions(None, s.chosen, s.rejected) for s in row.segments]
    chosen, rejected = pair_logprobs(policy, row, everything)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for i, pair in enumerate(pairs.to_pylist()):
        for ours, response in ((chosen[i], pair["chosen"]), (rejected[i], pair["rejected"])):
            ids = torch.tensor([pair["prompt"] + response])
            logits = plain(ids).logits[0, len(pair["prompt"]) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
            assert torch.allclose(ours, expected, atol=0.05), "bf16 against fp32"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_equal_to_reference_gives_delta_zero_exactly(policy, reduction, loss):
    pairs = with_reference(policy, random_pairs(9, seed=2, longest=90))
    method = MethodConfig(loss=loss, reduction=reduction, beta=0.1)
    losses, sums = row_losses(policy, assemble(pairs), pairs, method, DRAW)
    metrics = dict(zip(METRICS, (sums / len(pairs)).tolist(), strict=True))
    assert metrics["margin"] == 0.0 and metrics["chosen_reward"] == 0.0 and metrics["rejected_reward"] == 0.0
    start = math.log(2) if loss == "sigmoid" else (1 / 0.2) ** 2
    assert losses.tolist() == pytest.approx([start] * len(pairs), rel=1e-6)


def test_a_pair_s_loss_does_not_depend_on_what_shares_its_row(policy):
    pairs = with_reference(policy, random_pairs(8, seed=5))
    ref = pa.array(
        [[x - 0.1 * i for i, x in enumerate(r)] for r in pairs["chosen_ref"].to_pylist()], pa.list_(pa.float32())
    )
    pairs = pairs.set_column(pairs.schema.get_field_index("chosen_ref"), "chosen_ref", ref)
    method = MethodConfig(reduction="sample")
    together, _ = row_losses(policy, assemble(pairs), pairs, method, DRAW)
    shuffled = pairs.take(pa.array([3, 1, 7, 0]))
    apart, _ = row_losses(policy, assemble(shuffled), shuffled, method, DRAW)
    assert torch.equal(together[[3, 1, 7, 0]], apart)


def test_the_gradient_is_that_of_a_naive_computation(tiny_model):
    """fp64: packed rows, shared prompts and sampled positions against one padded sequence at a time and log_softmax."""
    policy = load_policy(tiny_model).double()
    pairs = with_reference(load_policy(tiny_model), random_pairs(4, seed=7))
    method = MethodConfig(reduction="sample", beta=0.3)
    losses, _ = row_losses(policy, assemble(pairs), pairs, method, DRAW)
    losses.mean().backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    naive = []
    for pair in pairs.to_pylist():
        at = sampled_positions(
            MaskKey(DRAW.seed, DRAW.round, DRAW.epoch, pair["id"]), len(pair["chosen"]), len(pair["rejected"])
        )
        total = {}
        for side, kept in (("chosen", at.chosen), ("rejected", at.rejected)):
            ids = torch.tensor([pair["prompt"] + pair[side]])
            logps = plain(ids).logits[0, len(pair["prompt"]) - 1 : -1].log_softmax(-1)
            picked = logps.gather(1, torch.tensor(pair[side])[:, None])[:, 0]
            total[side] = (picked - torch.tensor(pair[f"{side}_ref"], dtype=torch.float64))[kept].sum()
        naive.append(-torch.nn.functional.logsigmoid(0.3 * (total["chosen"] - total["rejected"])))
    torch.stack(naive).mean().backward()
    assert torch.allclose(losses, torch.stack(naive), atol=1e-6)
    ours = dict(policy.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.allclose(ours[name].grad, parameter.grad, atol=1e-6), name
