"""The method: positions, reductions, losses, log-probs and the objective, against independent computations."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from sampo_ray.config.rows import RowBudget
from sampo_ray.config.sections import MethodConfig
from sampo_ray.training import cpu
from sampo_ray.training.batching import assemble
from sampo_ray.training.logprobs import Distributions, Tile, token_comparisons, token_logprobs
from sampo_ray.training.objective import Draw, LossInputs, MaskedPositions, objective_of, row_losses
from sampo_ray.training.policy import every_token, load_policy, pair_logprobs, score_pairs
from sampo_ray.training.reduction import REDUCTIONS, MaskKey, all_positions, reduce_pairs, sampled_positions
from sampo_ray.training.streams import Stream
from tests.conftest import random_pairs, with_reference

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
        sampled_positions(key, 200, 100).chosen, sampled_positions(key, 200, 100, Stream.REFERENCE_MASK).chosen
    )


def test_expected_sampled_sum_is_the_scaled_sum():
    ratios = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = [ratios[sampled_positions(MaskKey(0, 0, 0, str(i)), 60, 20).chosen].sum() for i in range(4000)]
    error = torch.stack(draws).std() / math.sqrt(len(draws))
    assert abs(torch.stack(draws).mean() - ratios.sum() * 20 / 60) < 4 * error


ALPHA = 0.4
"""Of reduction ld in tests."""


def naive_reduction(name, w, r, positions):
    """s_w, s_l and the tokens that they stand for, out of the log-ratios of all tokens; `positions` are the sampled."""
    shorter = min(len(w), len(r))
    if name == "average":
        half = (len(w) + len(r)) / 2
        return half * sum(w) / len(w), half * sum(r) / len(r), half, half
    if name == "mean":
        return sum(w) / len(w), sum(r) / len(r), 1, 1
    if name == "ld":
        weights = [1.0 if t < shorter else ALPHA for t in range(max(len(w), len(r)))]
        s_w, s_l = (sum(c * x for c, x in zip(weights, side, strict=False)) for side in (w, r))
        return s_w, s_l, sum(weights[: len(w)]), sum(weights[: len(r)])
    if name == "sample":
        w, r = [w[t] for t in positions.chosen], [r[t] for t in positions.rejected]
    if name == "top_k":
        w, r = (sorted(side, key=float, reverse=True)[:shorter] for side in (w, r))
    return sum(w), sum(r), len(w), len(r)


def reduced(name, ws, rs, sizes):
    settings = {"alpha": ALPHA} if name == "ld" else {}
    return reduce_pairs(REDUCTIONS[name], ws, rs, sizes, **settings)


@pytest.mark.parametrize("name", REDUCTIONS)
@given(lengths, lengths, st.integers(0, 1000))
@settings(max_examples=30)
def test_reductions_match_their_definition(name, length_w, length_l, seed):
    rng = torch.Generator().manual_seed(seed)
    w, r = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (length_w, length_l))
    key = MaskKey(0, 0, 0, str(seed))
    at = REDUCTIONS[name].positions(key, length_w, length_l)
    got = reduced(name, [w[at.chosen]], [r[at.rejected]], [(length_w, length_l)])
    expected = naive_reduction(name, w, r, sampled_positions(key, length_w, length_l))
    numbers = torch.cat([got.chosen, got.rejected, got.chosen_tokens, got.rejected_tokens])
    assert torch.allclose(numbers, torch.tensor(expected, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_does_not_depend_on_the_order_of_the_batch(name):
    rng = torch.Generator().manual_seed(3)
    ws, rs = ([torch.randn(5 + 3 * i, generator=rng) for i in range(6)] for _ in range(2))
    sizes = [(len(w), len(r)) for w, r in zip(ws, rs, strict=True)]
    forward, backward = reduced(name, ws, rs, sizes), reduced(name, ws[::-1], rs[::-1], sizes[::-1])
    assert torch.equal(forward.delta, backward.delta.flip(0))


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
        out = token_logprobs(Distributions(h, w), targets, Tile(16, 20)) if tiled else naive
        (out * upstream).sum().backward()
        results.append((out, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@given(st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_token_comparisons_and_gradients_are_those_of_the_formulas_in_fp64(tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (tokens, 50))
    reference = [torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (tokens, 50)]
    targets = torch.randint(50, (tokens,), generator=rng)
    upstream = torch.randn(3, tokens, generator=rng, dtype=torch.float64)
    results = []
    for tiled in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        theirs, ours = (reference[0] @ reference[1].T).log_softmax(-1), (h @ w.T).log_softmax(-1)
        picked = (each.gather(1, targets[:, None])[:, 0] for each in (ours, theirs))
        naive = torch.stack([*picked, (theirs.exp() * (theirs - ours)).sum(-1)])
        out = (
            token_comparisons(Distributions(h, w), Distributions(*reference), targets, Tile(16, 20)) if tiled else naive
        )
        (out * upstream).sum().backward()
        results.append((out, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_policy_compared_with_itself_has_the_bits_of_its_logprobs_and_no_divergence():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=rng).bfloat16() for n in (30, 512))
    targets = torch.randint(512, (30,), generator=rng)
    itself = Distributions(hidden, weight)
    ours, theirs, divergences = token_comparisons(itself, itself, targets)
    assert torch.equal(ours, theirs) and torch.equal(ours, token_logprobs(itself, targets))
    assert not divergences.any()


def test_a_token_s_logprob_does_not_depend_on_how_many_are_asked_for():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=rng).bfloat16()
    weight = torch.randn(512, 64, generator=rng).bfloat16()
    targets = torch.randint(512, (300,), generator=rng)
    everything = token_logprobs(Distributions(hidden, weight), targets)
    some = torch.tensor([0, 3, 64, 65, 130, 299])
    assert torch.equal(token_logprobs(Distributions(hidden[some], weight), targets[some]), everything[some])


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor with memory that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_meta]
        self.numbers = max([self.numbers, *found])
        return out


@pytest.mark.parametrize("compared", [False, True])
def test_nothing_is_ever_as_large_as_tokens_times_vocabulary(compared):
    rng = torch.Generator().manual_seed(0)
    tokens, words, tile = 600, 20_000, Tile(128, 1024)
    hidden, weight = (torch.randn(n, 16, generator=rng).bfloat16().requires_grad_() for n in (tokens, words))
    targets = torch.randint(words, (tokens,), generator=rng)
    with Largest() as largest:
        if compared:
            reference = Distributions(hidden.detach(), weight.detach())
            out = token_comparisons(Distributions(hidden, weight), reference, targets, tile)
        else:
            out = token_logprobs(Distributions(hidden, weight), targets, tile)
        out.sum().backward()
    assert tile.tokens * tile.vocabulary <= largest.numbers <= max(tile.tokens * tile.vocabulary, weight.numel())


def test_a_frozen_head_gets_no_gradient_and_changes_none():
    rng = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(50, 8, generator=rng), torch.randint(50, (20,), generator=rng)
    hidden = [torch.randn(20, 8, generator=rng).requires_grad_()]
    hidden.append(hidden[0].detach().clone().requires_grad_())
    for states, frozen in zip(hidden, (True, False), strict=True):
        of = Distributions(states, weight.requires_grad_(not frozen))
        token_logprobs(of, targets, Tile(16, 20)).sum().backward()
        assert (weight.grad is None) == frozen
    assert torch.equal(hidden[0].grad, hidden[1].grad)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(tiny_model)


def test_a_row_s_logprobs_are_those_of_the_plain_model(policy, tiny_model):
    pairs = random_pairs(5)
    row = assemble(pairs)
    everything = [all_positions(None, s.chosen, s.rejected) for s in row.segments]
    chosen, rejected = pair_logprobs(policy, row, everything)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for i, pair in enumerate(pairs):
        for ours, response in ((chosen[i], pair.chosen), (rejected[i], pair.rejected)):
            ids = torch.tensor([[*pair.prompt, *response]])
            logits = plain(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(response).long()[:, None])[:, 0]
            assert torch.allclose(ours, expected, atol=0.05), "bf16 against fp32"


@pytest.mark.parametrize("prompts", [8, 3])
def test_a_pair_s_loss_does_not_depend_on_what_shares_its_row_or_its_prompt(policy, prompts):
    pairs = with_reference(policy, random_pairs(8, seed=5, prompts=prompts))
    falling = np.arange(99, dtype=np.float32) / 10
    pairs = [replace(pair, chosen_ref=pair.chosen_ref - falling[: len(pair.chosen)]) for pair in pairs]
    method = objective_of(MethodConfig(reduction="sample"))
    together, _ = row_losses(policy, assemble(pairs), pairs, LossInputs(method, DRAW))
    shuffled = [pairs[i] for i in (3, 1, 7, 0)]
    apart, _ = row_losses(policy, assemble(shuffled), shuffled, LossInputs(method, DRAW))
    assert torch.equal(together[[3, 1, 7, 0]], apart)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("how", "again"), [(False, (0, 0)), (True, (1, 6)), ("selective", (0, 4))])
def test_checkpointing_computes_again_what_it_should(tiny_model, how, again, bf16, monkeypatch):
    """Of a layer's seven products the last is not needed; selectively, attention, gate and up are kept.

    Through fp32 kernels the last one is computed again, too: torch saves the tensors of a product of our own, which the
    backward pass needs, once it is done.
    """
    monkeypatch.setattr(cpu, "fast_bf16", lambda: bf16)
    products = again[1] + (how is not False and not bf16)
    policy, pairs = load_policy(tiny_model, how).train(), random_pairs(1, longest=30)
    row, layers, counts = assemble(pairs), policy.model.config.num_hidden_layers, Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[op.overloadpacket._qualified_op_name] += 1
            return op(*args, **(kwargs or {}))

    logprobs, _ = pair_logprobs(policy, row, every_token(pairs))
    hidden = logprobs[0].sum()
    with Counting():
        hidden.backward()
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2 * layers * again[0]
    assert counts["aten::silu"] == layers * (how is not False)
    assert counts["aten::mm"] == counts["aten::silu_backward"] * (2 * 7 + products) + 2  # the head's


def test_a_reference_that_is_asked_for_sampled_tokens_has_their_bits(policy):
    pairs, method, epochs = random_pairs(8, seed=9, longest=60), objective_of(MethodConfig()), 2
    every = score_pairs(policy, pairs, RowBudget(4, 256))
    some = score_pairs(policy, pairs, RowBudget(4, 256), MaskedPositions(method, DRAW.seed, DRAW.round, epochs))
    left_out = 0
    for side in ("chosen_ref", "rejected_ref"):
        for full, asked in ((getattr(a, side), getattr(b, side)) for a, b in zip(every, some, strict=True)):
            left_out += np.isnan(asked).sum()
            assert all(b == a or math.isnan(b) for a, b in zip(full, asked, strict=True))
    assert left_out
    for epoch in range(epochs):
        draw = replace(DRAW, epoch=epoch)
        ours, theirs = (row_losses(policy, assemble(t), t, LossInputs(method, draw))[0] for t in (some, every))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loss", ["sigmoid", "mix", "simpo"])
def test_the_gradient_is_that_of_a_naive_computation(tiny_model, loss):
    """fp64: packed rows, prompts shared within and across pairs, and sampled positions, against one padded sequence at
    a time and log_softmax.
    """
    policy = load_policy(tiny_model).double()
    pairs = with_reference(load_policy(tiny_model), random_pairs(4, seed=7, prompts=3))
    method = objective_of(MethodConfig(loss=loss, beta=0.3))
    losses, _ = row_losses(policy, assemble(pairs), pairs, LossInputs(method, DRAW))
    losses.mean().backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    naive = []
    for pair in pairs:
        key = MaskKey(DRAW.seed, DRAW.round, DRAW.epoch, pair.id)
        at = sampled_positions(key, len(pair.chosen), len(pair.rejected))
        total, mean = {}, {}
        for side, kept in (("chosen", at.chosen), ("rejected", at.rejected)):
            answer, reference = (torch.from_numpy(getattr(pair, name)) for name in (side, f"{side}_ref"))
            ids = torch.cat([torch.from_numpy(pair.prompt), answer])[None]
            logps = plain(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
            picked = logps.gather(1, answer.long()[:, None])[:, 0]
            mean[side] = picked.mean()
            total[side] = (picked - reference.double())[kept].sum()
        if loss == "simpo":
            naive.append(torch.log1p(torch.exp(1.4 - 0.3 * (mean["chosen"] - mean["rejected"]))))
        else:
            naive.append(torch.log1p(torch.exp(-0.3 * (total["chosen"] - total["rejected"]))))
        if loss == "mix":
            naive[-1] = naive[-1] - mean["chosen"]
    torch.stack(naive).mean().backward()
    assert torch.allclose(losses, torch.stack(naive), atol=1e-6)
    ours = dict(policy.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.allclose(ours[name].grad, parameter.grad, atol=1e-6), name
