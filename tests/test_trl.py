"""The family of losses against TRL's values, where TRL is installed: the project does not need it."""

import importlib.util
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from sampo_ray.training.statistics import Statistics
from tests.conftest import require
from tests.test_losses import ALPHA, START, family_loss, method_of, random_tokens

require(importlib.util.find_spec("trl"), "TRL")
import trl  # noqa: E402  (it is installed)


class Recorded(torch.nn.Module):
    """A model for TRL's trainer that answers with given token log-probs."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: torch.Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_):
        like = torch.zeros_like(self.logprobs)
        others = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), like)
        return SimpleNamespace(log_probs=self.logprobs, is_top1=like.bool(), **others)


def padded(tokens, longest):
    """[2 * pairs, longest]: all chosen responses, then all rejected ones."""
    rows = [pair[side].detach() for side in (0, 1) for pair in tokens]
    return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])


def inputs_of(lengths):
    """A batch of one prompt token each and responses of these lengths."""
    completion = padded([[torch.ones(n) for n in pair] for pair in lengths], longest_of(lengths))
    prompt = torch.zeros(len(completion), 1)
    return {
        "input_ids": torch.zeros(len(completion), completion.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.cat([1 - prompt, completion], 1),
        "completion_mask": torch.cat([prompt, completion], 1).long(),
    }


def longest_of(lengths):
    return max(max(pair) for pair in lengths)


def stub_of(model, **settings):
    """What TRL's trainers look at in themselves when they compute a loss."""
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"beta": 0.1, **settings},
    )


def trl_s_value(loss_types, loss_weights, policy, reference, lengths, **settings) -> float:
    model = Recorded(padded(policy, longest_of(lengths)))
    stub = stub_of(
        model,
        ref_model=Recorded(padded(reference, longest_of(lengths))),
        loss_types=loss_types,
        loss_weights=loss_weights,
        precompute_ref_logps=False,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        **{"label_smoothing": 0.1, "ld_alpha": None, **settings},
    )
    return float(trl.DPOTrainer._compute_loss(stub, model, inputs_of(lengths), False))


@pytest.mark.parametrize(
    ("loss", "reduction", "theirs"),
    [(name, "sum", [name]) for name in ("sigmoid", "robust", "hinge", "ipo", "nca_pair", "sppo_hard", "bco_pair")]
    + [("sigmoid", "ld", ["sigmoid"]), ("sigmoid", "mean", ["sigmoid_norm"]), ("mix", "sum", ["sigmoid", "sft"])],
)
def test_trl_has_the_same_value(loss, reduction, theirs):
    lengths = [(7, 12), (7, 3), (7, 9)]  # its sft term is a mean over the batch's tokens, ours over a pair's
    policy, reference = random_tokens(lengths, 5)
    more = {"ld_alpha": ALPHA} if reduction == "ld" else {}
    expected = trl_s_value(theirs, [1.0] * len(theirs), policy, reference, lengths, **more)
    ours = family_loss(method_of(loss, reduction), policy, reference, lengths, START)
    assert ours.mean().item() == pytest.approx(expected, rel=1e-6)


def test_trl_has_the_same_value_without_a_reference():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    lengths = [(7, 12), (4, 3)]
    policy, _ = random_tokens(lengths, 5)
    means = [torch.stack([pair[side].mean() for pair in policy]).detach() for side in (0, 1)]
    cpu = SimpleNamespace(device="cpu")
    cpo = SimpleNamespace(alpha=0.0, beta=2.5, simpo_gamma=1.4, label_smoothing=0.0, loss_type="simpo", accelerator=cpu)
    theirs = CPOTrainer.cpo_loss(cpo, *means)[0]
    ours = family_loss(method_of("simpo", "mean"), policy, policy, lengths, START)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    theirs = -means[0] - ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.1, accelerator=cpu), *means)[0]
    ours = family_loss(method_of("orpo", "mean"), policy, policy, lengths, START)
    assert torch.allclose(ours, theirs.double(), rtol=1e-5)


def test_trl_s_kto_has_the_same_value_for_the_same_reference_point():
    lengths, kl, beta = [(7, 12), (7, 3), (7, 9)], 1.7, 0.1
    policy, reference = random_tokens(lengths, 5)
    model, responses = Recorded(padded(policy, longest_of(lengths))), 2 * len(lengths)
    stub = stub_of(
        model,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda *_: torch.full((responses,), kl, dtype=torch.float64),
    )
    inputs = inputs_of(lengths) | {
        "label": torch.tensor([True] * len(lengths) + [False] * len(lengths)),
        "ref_logps": padded(reference, longest_of(lengths)).sum(1),
        "ref_KL_logps": torch.zeros(responses, dtype=torch.float64),
    }
    expected = trl.KTOTrainer._compute_loss(stub, model, inputs, False)
    same = Statistics(chosen=beta * kl, rejected=beta * kl)
    ours = family_loss(method_of("kto_pair", "sum"), policy, reference, lengths, same)
    assert ours.mean().item() == pytest.approx(float(expected), rel=1e-6)
