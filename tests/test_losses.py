"""The family of losses: each against an independent, naive computation of its published formula; what the configuration
refuses; and batch statistics from step to step.
"""

import dataclasses
import math
import sys
from collections.abc import Callable

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sampo_ray.config.losses import LOSSES, LossSettings, PreferenceLoss
from sampo_ray.config.profiles import resolve
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import MethodConfig
from sampo_ray.console import session
from sampo_ray.errors import ConfigError
from sampo_ray.run.directory import create_run, open_run
from sampo_ray.run.manifest import Checkpoint, lineage
from sampo_ray.training.batching import Pair, assemble
from sampo_ray.training.losses import ScoredPairs, evaluate, sigmoid
from sampo_ray.training.objective import METRICS, Draw, LossInputs, Objective, objective_of, row_losses, row_positions
from sampo_ray.training.policy import Policy, load_policy
from sampo_ray.training.reduction import REDUCTIONS, MaskKey, reduce_pairs, sampled_positions
from sampo_ray.training.statistics import Statistics
from tests.conftest import random_pairs, with_reference
from tests.test_method import ALPHA, naive_reduction

DRAW = Draw(seed=1, round=0, epoch=0)
START = Statistics()
COMBINED = [(loss, reduction) for loss in LOSSES for reduction in LOSSES[loss].reductions]


def method_of(loss: str, reduction: str | None = None, **settings: float) -> Objective:
    alpha = ALPHA if reduction == "ld" else None
    return objective_of(MethodConfig(loss=loss, reduction=reduction, alpha=alpha, **settings))


# --- the losses, in fp64, pair by pair and token by token as their papers write them


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def naive_loss(name, s_w, s_l, n_w, n_l, log_w, lengths, c, before, divergences=()):
    """One pair's loss; log_w are the log-probs of all chosen tokens, c the settings."""
    log, b = torch.log, c.beta
    p = sigma(b * s_w - b * s_l)
    if name == "sigmoid":
        return -(1 - c.label_smoothing) * log(p) - c.label_smoothing * log(1 - p)
    if name == "robust":
        e = c.label_smoothing
        return ((1 - e) * -log(p) - e * -log(1 - p)) / (1 - 2 * e)
    if name == "hinge":
        return torch.clamp(1 - (b * s_w - b * s_l), min=0)
    if name == "ipo":
        return (s_w / n_w - s_l / n_l - 0.5 / b) ** 2
    if name == "dpop":
        return -log(sigma(b * (s_w - s_l - c.weight * torch.clamp(-s_w, min=0))))
    if name == "mix":
        return -log(p) + c.weight * -sum(log_w) / len(log_w)
    if name == "lenN":
        return -log(sigma(b * s_w - b * s_l + c.weight * lengths[0] - c.weight * lengths[1]))
    if name == "orpo":
        odds = [torch.exp(s) / (1 - torch.exp(s)) for s in (s_w, s_l)]
        return -s_w + b * -log(sigma(log(odds[0] / odds[1])))
    if name == "simpo":
        return -log(sigma(b * s_w - b * s_l - c.margin))
    if name == "kto_pair":
        z_w, z_l = max(0, before.chosen), max(0, before.rejected)
        return (1 - sigma(b * s_w - z_l) + 1 - sigma(z_w - b * s_l)) / 2
    if name == "bco_pair":
        return -log(sigma(b * s_w - before.both)) - log(sigma(-(b * s_l - before.both)))
    if name == "sppo_hard":
        return (s_w - 0.5 / b) ** 2 + (s_l + 0.5 / b) ** 2
    if name == "tdpo":
        d_w, d_l = divergences
        return -log(sigma(b * s_w - b * s_l - c.weight * (b * d_l - b * d_w.detach())))
    assert name == "nca_pair"
    return -log(sigma(b * s_w)) - 0.5 * log(sigma(-b * s_w)) - 0.5 * log(sigma(-b * s_l))


def random_tokens(lengths, seed):
    """Token log-probs of policy and reference in fp64; those of the policy take gradients."""
    rng = torch.Generator().manual_seed(seed)

    def draw(n):
        return -3 * torch.rand(n, generator=rng, dtype=torch.float64) - 0.01

    policy = [[draw(n).requires_grad_() for n in pair] for pair in lengths]
    return policy, [[p.detach() + 0.3 * draw(len(p)) + 0.4 for p in pair] for pair in policy]


def family_loss(method, policy, reference, lengths, before):
    """Ours, from token log-probs: as the trainer does it, but without a model."""
    loss, reduction = method.loss, method.reduction
    sides = ([], [])
    for i, (pair, ref) in enumerate(zip(policy, reference, strict=True)):
        at = reduction.positions(MaskKey(1, 0, 0, str(i)), *lengths[i])
        for side, p, r, kept in zip(sides, pair, ref, (at.chosen, at.rejected), strict=True):
            side.append(p[kept] if loss.reference == "nothing" else p[kept] - r[kept])
    ratios = reduce_pairs(reduction, *sides, lengths, **method.reduced_with)
    tokens = torch.tensor(lengths, dtype=torch.float64)
    chosen = torch.stack([pair[0].mean() for pair in policy])
    apart = [torch.stack(side) for side in zip(*map(made_up_divergences, policy, reference), strict=True)]
    scored = ScoredPairs(ratios, tokens[:, 0], tokens[:, 1], chosen, None, *apart)
    return evaluate(loss, scored, method.settings, before)


def made_up_divergences(pair, reference):
    """Some numbers that depend on the policy; the real ones are tested on a model."""
    return [(p - r).square().sum() for p, r in zip(pair, reference, strict=True)]


pair_lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)
statistics = st.builds(Statistics, *[st.floats(-2, 2)] * 3)


@pytest.mark.parametrize(("loss", "reduction"), COMBINED)
@given(pair_lengths, st.integers(0, 9999), statistics)
@settings(max_examples=12)
def test_a_loss_and_its_gradient_are_those_of_the_naive_formula(loss, reduction, lengths, seed, before):
    method = method_of(loss, reduction)
    if loss == "sigmoid":
        method = method_of(loss, reduction, label_smoothing=0.2)
    policy, reference = random_tokens(lengths, seed)
    ours = family_loss(method, policy, reference, lengths, before)
    ours.sum().backward()
    gradients = [p.grad for pair in policy for p in pair]

    again, _ = random_tokens(lengths, seed)
    naive = []
    for i, (pair, ref) in enumerate(zip(again, reference, strict=True)):
        free = loss in ("orpo", "simpo")
        w, r = ([a if free else a - b for a, b in zip(*side, strict=True)] for side in zip(pair, ref, strict=True))
        sequences = naive_reduction(reduction, w, r, sampled_positions(MaskKey(1, 0, 0, str(i)), len(w), len(r)))
        apart = made_up_divergences(pair, ref)
        naive.append(naive_loss(loss, *sequences, pair[0], lengths[i], method.settings, before, apart))
    torch.stack(naive).sum().backward()
    assert torch.allclose(ours, torch.stack(naive), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients, [p.grad for pair in again for p in pair], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("loss", "reduction"), COMBINED)
def test_a_pair_s_loss_does_not_depend_on_the_order_of_the_batch(loss, reduction):
    method, before = method_of(loss, reduction), Statistics(0.3, -0.2, 0.1, 7)
    lengths = [(8, 8)] * 5  # of equal lengths, so that the masks by place do not matter
    policy, reference = random_tokens(lengths, 3)
    forward = family_loss(method, policy, reference, lengths, before)
    backward = family_loss(method, policy[::-1], reference[::-1], lengths, before)
    assert torch.equal(forward, backward.flip(0))


def test_orpo_of_a_response_of_probability_one_has_a_finite_loss_and_gradient():
    chosen = torch.zeros(1, requires_grad=True)
    ratios = reduce_pairs(REDUCTIONS["mean"], [chosen], [torch.full((3,), -1.0)], [(1, 3)])
    scored = ScoredPairs(ratios, torch.ones(1), torch.full((1,), 3.0))
    loss = evaluate(LOSSES["orpo"], scored, LossSettings(beta=0.1), START)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


# --- on a model


@pytest.fixture(scope="module")
def policy(tiny_model) -> Policy:
    return load_policy(tiny_model)


@pytest.fixture(scope="module")
def referenced(policy) -> list[Pair]:
    """Pairs whose reference is the policy itself."""
    return with_reference(policy, random_pairs(6, seed=2, longest=60))


def at_reference(loss: str, chosen: int, rejected: int) -> float:
    """What the loss of a pair is by its formula, where all log-ratios are 0."""
    ln2 = math.log(2)
    return {
        "hinge": 1.0,
        "ipo": 25.0,
        "lenN": math.log1p(math.exp(-0.01 * (chosen - rejected))),
        "kto_pair": 0.5,
        "bco_pair": 2 * ln2,
        "sppo_hard": 50.0,
        "nca_pair": 2 * ln2,
    }.get(loss, ln2)


@pytest.mark.parametrize(("loss", "reduction"), [each for each in COMBINED if each[0] not in ("mix", "orpo", "simpo")])
def test_policy_equal_to_reference_gives_delta_zero_exactly(policy, referenced, loss, reduction):
    pairs, row = referenced, assemble(referenced)
    losses, sums = row_losses(
        policy, row, pairs, LossInputs(method_of(loss, reduction), DRAW, reference=policy.distributions)
    )
    metrics = dict(zip(METRICS, (sums / len(pairs)).tolist(), strict=True))
    assert metrics["margin"] == 0.0 and metrics["chosen_reward"] == 0.0 and metrics["rejected_reward"] == 0.0
    assert losses.tolist() == pytest.approx([at_reference(loss, s.chosen, s.rejected) for s in row.segments], rel=1e-6)


def without_reference(pairs: list[Pair]) -> list[Pair]:
    return [dataclasses.replace(pair, chosen_ref=None, rejected_ref=None) for pair in pairs]


def mean_logprobs(pairs: list[Pair]) -> list[torch.Tensor]:
    """Of chosen and rejected, a token, under the reference."""
    sides = [pair.chosen_ref for pair in pairs], [pair.rejected_ref for pair in pairs]
    return [torch.tensor([x.mean() for x in side], dtype=torch.float64) for side in sides]


@pytest.mark.parametrize("reduction", ["sum", "sample"])
def test_mix_adds_the_likelihood_of_all_chosen_tokens_whatever_the_reduction(policy, referenced, reduction):
    pairs = referenced
    losses, sums = row_losses(policy, assemble(pairs), pairs, LossInputs(method_of("mix", reduction, weight=0.5), DRAW))
    assert torch.allclose(losses, math.log(2) - 0.5 * mean_logprobs(pairs)[0].float(), atol=1e-5)
    assert sums[METRICS.index("margin")] == 0.0


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_need_no_reference_log_probs_and_report_log_probs(policy, referenced, loss):
    pairs = without_reference(referenced)
    method = method_of(loss)
    losses, sums = row_losses(policy, assemble(pairs), pairs, LossInputs(method, DRAW))
    chosen, rejected = mean_logprobs(referenced)
    expected = [
        naive_loss(loss, w, r, 1, 1, [], (), method.settings, START) for w, r in zip(chosen, rejected, strict=True)
    ]
    assert losses.tolist() == pytest.approx([float(x) for x in expected], rel=1e-4)
    metrics = dict(zip(METRICS, (sums / len(pairs)).tolist(), strict=True))
    assert metrics["margin"] == pytest.approx(method.settings.beta * float((chosen - rejected).mean()), abs=1e-5)
    assert metrics["chosen_logratio_per_token"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))


def test_tdpo_compares_whole_distributions(tiny_model, policy, referenced):
    other = load_policy(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    method, pairs = method_of("tdpo", "sum"), without_reference(referenced)
    losses, _ = row_losses(policy, assemble(pairs), pairs, LossInputs(method, DRAW, reference=other.distributions))
    plain = [AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16) for _ in range(2)]
    plain[1].load_state_dict(dict(other.model.named_parameters()), strict=False)

    def of_answer(pair, side):
        """s and D of an answer, from the logits of the plain models."""
        answer = torch.tensor(getattr(pair, side)).long()
        ids = torch.cat([torch.tensor(pair.prompt), answer])
        ours, theirs = (model(ids[None]).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1) for model in plain)
        at = answer[:, None]
        return (ours - theirs).gather(1, at).sum(), (theirs.exp() * (theirs - ours)).sum()

    with torch.no_grad():
        sides = [[of_answer(pair, side) for side in ("chosen", "rejected")] for pair in pairs]
    expected = [
        float(naive_loss("tdpo", s_w, s_l, 0, 0, [], (), method.settings, START, (d_w, d_l)))
        for (s_w, d_w), (s_l, d_l) in sides
    ]
    without = [
        float(naive_loss("sigmoid", s_w, s_l, 0, 0, [], (), LossSettings(method.settings.beta), START))
        for (s_w, _), (s_l, _) in sides
    ]
    assert max(abs(a / b - 1) for a, b in zip(expected, without, strict=True)) > 0.3, "the divergences matter"
    assert losses.tolist() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("positions", "sides"), [("reduction", 0), ("chosen", 1), ("all", 2)])
def test_logits_are_computed_only_at_the_positions_that_the_loss_asks_for(
    policy, referenced, positions, sides, monkeypatch
):
    seen: list[ScoredPairs] = []

    def watched(pairs, settings):
        seen.append(pairs)
        return sigmoid(pairs, settings)

    monkeypatch.setitem(LOSSES, "watched", PreferenceLoss(watched, positions=positions))
    pairs, row, method = referenced, assemble(referenced), method_of("watched")
    asked = []
    hook = policy.register_forward_pre_hook(lambda module, arguments: asked.append(len(arguments[3])))
    losses, _ = row_losses(policy, row, pairs, LossInputs(method, DRAW))
    hook.remove()
    kept = row_positions(method, DRAW, pairs)[0]
    counts = [
        (s.chosen if sides > 0 else len(at.chosen), s.rejected if sides > 1 else len(at.rejected))
        for s, at in zip(row.segments, kept, strict=True)
    ]
    assert asked == [sum(map(sum, counts))]
    assert [x is not None for x in (seen[0].chosen_logprob, seen[0].rejected_logprob)] == [sides > 0, sides > 1]
    assert losses.tolist() == pytest.approx([math.log(2)] * 6), "the reduction's own positions are the same"


# --- statistics


def test_statistics_are_those_of_the_last_step_and_a_running_mean_over_the_round():
    first = START.after({"chosen_reward": 2.0, "rejected_reward": -1.0}, 4)
    second = first.after({"chosen_reward": 0.5, "rejected_reward": 0.0}, 2)
    assert (second.chosen, second.rejected, second.pairs) == (0.5, 0.0, 6)
    assert second.both == pytest.approx((4 * (2 - 1) + 2 * 0.5) / (2 * 6))


@given(st.builds(Statistics, *[st.floats(allow_nan=False, allow_infinity=False)] * 3, st.integers(0, 2**40)))
def test_statistics_keep_their_bits_in_the_manifest(statistics):
    checkpoint = Checkpoint(path="p", round=0, step=1, world=2, files={}, statistics=statistics)
    reported = Checkpoint(**checkpoint.model_dump())
    assert Checkpoint.model_validate_json(reported.model_dump_json()).statistics == statistics


def test_a_checkpoint_of_a_manifest_without_statistics_has_those_of_a_start():
    assert Checkpoint(path="p", round=0, step=1, world=2, files={}).statistics == START


@pytest.mark.parametrize("loss", ["kto_pair", "bco_pair"])
def test_steps_from_a_stored_checkpoint_have_the_bits_of_steps_without_a_stop(tiny_model, policy, loss):
    pairs = with_reference(policy, random_pairs(8, seed=8))
    method = method_of(loss, "sample", beta=1.0)

    def stored(statistics: Statistics) -> Statistics:
        kept = Checkpoint(path="p", round=0, step=1, world=1, files={}, statistics=statistics)
        return Checkpoint.model_validate_json(kept.model_dump_json()).statistics

    def train(at_the_stop: Callable[[Statistics], Statistics]) -> list[float]:
        learner, statistics, seen = load_policy(tiny_model), START, []
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
        for step in range(4):
            mine = pairs[4 * (step % 2) :][:4]
            losses, sums = row_losses(learner, assemble(mine), mine, LossInputs(method, DRAW, statistics))
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = dict(zip(METRICS, (sums / len(mine)).tolist(), strict=True))
            statistics = statistics.after(metrics, len(mine))
            if step == 1:
                statistics = at_the_stop(statistics)
            seen.append(losses.mean().item())
        return seen

    undisturbed = train(lambda statistics: statistics)
    assert train(stored) == undisturbed
    assert train(lambda statistics: START) != undisturbed, "they matter"


# --- the configuration


TREE = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("loss=tdpo reduction=mean", ["method.loss='tdpo'", "reduction='mean'", "use reduction: sum or"]),
        ("loss=tdpo mask=independent", ["mask='independent'", "'tdpo'"]),
        ("loss=ld_dpo", ["method.loss='ld_dpo'", "method.reduction=ld"]),
        ("loss=simpo reduction=sample", ["method.loss='simpo'", "reduction='sample'", "use reduction: mean"]),
        ("loss=orpo reduction=top_k", ["method.loss='orpo'", "reduction='top_k'", "use reduction: mean"]),
        ("loss=orpo mask=independent", ["mask='independent'", "'orpo'"]),
        ("margin=1", ["method.loss='sigmoid' has no margin", "drop margin=1.0"]),
        ("loss=kto_pair weight=2", ["method.loss='kto_pair' has no weight", "drop weight=2.0"]),
        ("loss=hinge label_smoothing=0", ["method.loss='hinge' has no label_smoothing"]),
        ("loss=robust label_smoothing=0.5", ["method.label_smoothing", "less than 0.5"]),
        ("loss=mix weight=-1", ["method.weight", "greater than or equal to 0"]),
        ("alpha=0.5", ["alpha=0.5", "reduction='sample'"]),
        ("reduction=ld", ["alpha=None", "reduction='ld'", "needs it"]),
        ("reduction=ld alpha=2", ["method.alpha", "less than or equal to 1"]),
        ("loss=null", ["method.loss", "string"]),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config(TREE, [f"method.{each}" for each in overrides.split()])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("no_such_package:mine", "ModuleNotFoundError"),
        ("math:mine", "AttributeError"),
        ("math:pi", "cannot be called"),
        ("own_losses:of_three", "missing a required argument"),
        ("own_losses:asks", "asks for gamma"),
    ],
)
def test_a_loss_of_the_user_s_own_is_checked_where_training_starts(own_losses, tmp_path, loss, words):
    config = load_config(TREE, [f"method.loss={loss}"])
    with pytest.raises(ConfigError, match=rf"method\.loss='{loss}'.*{words}"):
        config.method.check_loss()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=words):
        session.show(recipe, [f"method.loss={loss}"])


def test_a_run_directory_loads_where_its_loss_is_not_installed(own_losses, tmp_path, monkeypatch):
    overrides = ["method.loss=own_losses:weighted", "method.weight=2", f"run.dir={tmp_path / 'run'}"]
    begun = create_run(load_config(TREE, overrides)).config
    begun.method.check_loss()
    monkeypatch.setattr("sys.path", [each for each in sys.path if each != str(tmp_path)])
    sys.modules.pop("own_losses")
    config = open_run(str(tmp_path / "run")).config
    assert config.method == begun.method and lineage(config, None) == lineage(begun, None)
    resolve(config, {"CPU": 8}, cores=2)
    assert not config.method.needs_distributions
    with pytest.raises(ConfigError, match="No module named 'own_losses'"):
        config.method.check_loss()


def test_defaults_are_those_of_the_loss_and_survive_being_written():
    simpo = MethodConfig(loss="simpo")
    assert (simpo.beta, simpo.margin, simpo.reduction, simpo.weight) == (2.5, 1.4, "mean", None)
    assert not simpo.needs_reference and MethodConfig().needs_reference
    assert [MethodConfig(loss=name).weight for name in ("dpop", "mix", "lenN")] == [50, 1, 0.01]
    for name in LOSSES:
        method = MethodConfig(loss=name)
        assert MethodConfig.model_validate(method.model_dump()) == method
    assert objective_of(MethodConfig(loss="simpo", beta=2, margin=0)).settings == LossSettings(beta=2.0)


OWN = """
from sampo_ray.config.losses import PreferenceLoss
from sampo_ray.training.losses import sigmoid

def mine(pairs, settings):
    return settings.beta * -pairs.ratios.delta

def of_three(pairs, settings, more):
    return pairs.ratios.delta

def one_number(pairs, settings):
    return pairs.ratios.delta.mean()

asks = PreferenceLoss(sigmoid, {"gamma": 1.0})
weighted = PreferenceLoss(lambda pairs, settings: -settings.weight * pairs.chosen_logprob, {"weight": 3.0}, "chosen")
"""


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_losses", None)


def test_a_loss_of_the_user_s_own_is_named_by_where_it_is(own_losses, policy, referenced):
    pairs, row = referenced, assemble(referenced)
    losses, _ = row_losses(policy, row, pairs, LossInputs(method_of("own_losses:mine"), DRAW))
    assert losses.tolist() == [0.0] * 6
    method = method_of("own_losses:weighted")
    losses, _ = row_losses(policy, row, pairs, LossInputs(method, DRAW))
    assert method.settings.weight == 3.0 and torch.allclose(losses, -3 * mean_logprobs(pairs)[0].float(), atol=1e-4)
    with pytest.raises(ValueError, match="not one number for each pair"):
        row_losses(policy, row, pairs, LossInputs(method_of("own_losses:one_number"), DRAW))
