"""What each part of the train step gives by itself: forward and backward passes with all of them, and without one.

Without packing each pair is a row of its own; without prompt sharing each answer has a copy of the prompt; without the
sampled head logits are computed at all tokens of the answers; without tiles the logits of a row are there at once.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import _measure
import _training
from _measure import Target
from _training import PAIRS_A_STEP, Memory, now, over

SIDES = ("all", "no_packing", "no_prompt_sharing", "no_sampled_head", "no_tiles")
NAMES = ("packing", "prompt_sharing", "sampled_head", "tiles")


def main() -> None:
    _training.run("ablation", _training.options(__doc__.splitlines()[0], SIDES), one_turn, compare, target_of)


def target_of(ratio: str) -> Target:
    return Target(at_most=1.0) if "memory" in ratio else Target(at_least=1.0)


def compare(model: tuple[str, str], args: Namespace, rows: list[Any], ratios: dict[str, list[float]]) -> None:
    found, pairs = _training.turns(__file__, SIDES, model, args)
    label, count = model[1], f"{args.repeats} x {pairs} pairs"
    for name, turns in found.items():
        rows += [
            (f"{label}, {name}: pairs/s", _measure.spread([turn["pairs_per_s"] for turn in turns], 2), count),
            ("  memory beyond weights, MB", _measure.spread([turn["step_mb"] for turn in turns]), count),
        ]
    for name, side in zip(NAMES, SIDES[1:], strict=True):
        ratios[f"pairs_per_s_with_vs_without_{name}/{label}"] = over(found["all"], found[side], "pairs_per_s")
        ratios[f"memory_with_vs_without_{name}/{label}"] = over(found["all"], found[side], "step_mb")


def one_turn(args: Namespace) -> dict[str, float]:
    import torch

    from sampo_ray.config.rows import RowBudget
    from sampo_ray.training.policy import batch_rows, load_policy

    side = args.side
    policy = load_policy(
        args.model, _training.CHECKPOINTING[args.checkpointing], str(_training.device()), attention=args.attention
    ).train()
    pairs, budget = _training.tokens_of(args), _training.budget_of(args)
    budget = RowBudget(PAIRS_A_STEP, 1) if side == "no_packing" else budget
    rows = [[pairs[i] for i in row] for batch in batch_rows(pairs, budget) for row in batch if len(row)]
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if side == "no_tiles":
        policy.head.forward = partial(whole_head, policy.head)
    for row in _training.warming(rows):
        passes(policy, row, side)
    with Memory() as memory:
        begun = now()
        for row in rows:
            passes(policy, row, side)
        seconds = now() - begun
    return {"pairs_per_s": len(pairs) / seconds, "step_mb": memory.beyond / 1e6}


def passes(policy: Any, pairs: list[Any], side: str) -> None:
    """A row forward and backward, with SamPO's loss and no reference: that costs nothing here."""
    import torch

    from sampo_ray.training.batching import assemble
    from sampo_ray.training.policy import every_token, pair_logprobs
    from sampo_ray.training.reduction import REDUCTIONS, MaskKey, Positions

    row = (unshared(pairs) if side == "no_prompt_sharing" else assemble(pairs)).to(_training.device())
    kept = [
        REDUCTIONS["sample"].positions(MaskKey(0, 0, 0, pair.id), len(pair.chosen), len(pair.rejected))
        for pair in pairs
    ]
    asked = every_token(pairs) if side == "no_sampled_head" else kept
    if side == "no_prompt_sharing":
        nothing = asked[0].chosen[:0]
        halves = [Positions(tokens, nothing) for pair in asked for tokens in (pair.chosen, pair.rejected)]
        answers, _ = pair_logprobs(policy, row, halves)
        chosen, rejected = answers[0::2], answers[1::2]
    else:
        chosen, rejected = pair_logprobs(policy, row, asked)
    if side == "no_sampled_head":
        chosen = [logprobs[torch.from_numpy(at.chosen)] for logprobs, at in zip(chosen, kept, strict=True)]
        rejected = [logprobs[torch.from_numpy(at.rejected)] for logprobs, at in zip(rejected, kept, strict=True)]
    margins = torch.stack([w.sum() - r.sum() for w, r in zip(chosen, rejected, strict=True)])
    (-torch.nn.functional.logsigmoid(0.1 * margins)).sum().backward()


def unshared(pairs: list[Any]) -> Any:
    """The row of the same pairs with each answer behind a prompt of its own; `chosen` of two segments are a pair's.

    The prompts differ in their first tokens: the same would be there once.
    """
    import numpy as np

    from sampo_ray.training.batching import Pair, assemble

    answers = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            prompt = pair.prompt.copy()
            prompt[0] = len(answers)
            answers.append(Pair("", prompt, answer, np.empty(0, np.int32)))
    return assemble(answers)


def whole_head(head: Any, hidden: Any, targets: Any, _: None) -> Any:
    """Log-probs from one tensor of logits, fp32, kept for the backward pass."""
    logits = (hidden @ head.weight.T).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


if __name__ == "__main__":
    main()
