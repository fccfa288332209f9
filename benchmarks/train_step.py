"""The train step against TRL's DPOTrainer: pairs per second, and memory beyond weights, masters and moments.

Torch and transformers will do: without DeepSpeed ours is the step of `training/objective.py` instead of that of a
run, and without TRL it is compared with nobody. Against TRL's defaults, which compute the reference within the step,
ours counts the seconds of its reference stage, too; against its best settings, which compute it beforehand, neither
does.

On a GPU: `--models llama1b --max-length 8192 --attention flex --peak 989` (TFLOP/s of an H100's dense bf16).
"""

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import _measure
import _training
from _measure import Target
from _training import PAIRS_A_STEP, Memory, now, over

LEARNING_RATE = 1e-6
SIDES = ("ours", "own", "trl_default", "trl_best")
"""Ours with `--attention`, and with the model's own, where each answer has a prompt of its own as it has in TRL."""
Optimize = Callable[[Any, list[Any], Any], None]
"""A step over pairs towards an objective."""
TRL_BEST: dict[str, Any] = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": PAIRS_A_STEP,
}
"""The fastest of TRL 1.16's settings that were tried: no padding, nothing computed twice; on CPUs in fp32."""
TARGETS = {
    "pairs_per_s_vs_trl_default": Target(at_least=3.0),
    "pairs_per_s_vs_trl_best": Target(at_least=2.0),
    "own_pairs_per_s_vs_trl_best": Target(at_least=1.0),
    "step_memory_vs_trl_best": Target(at_most=0.5),
    "sampo_vs_own_dpo": Target(at_least=1.0),
}


def main() -> None:
    parser = _training.options(__doc__.splitlines()[0], SIDES)
    parser.add_argument("--flags", default="{}", help="TRL settings on top of its side's, as JSON")
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device can do: shows how much of it is used")
    _training.run("train_step", parser, one_turn, compare, lambda ratio: TARGETS[ratio.split("/")[0]])


def compare(model: tuple[str, str], args: Namespace, rows: list[Any], ratios: dict[str, list[float]]) -> None:
    sides = SIDES if find_spec("trl") else SIDES[:2]
    found, pairs = _training.turns(__file__, sides, model, args, ["--flags", args.flags])
    label, count = model[1], f"{args.repeats} x {pairs} pairs"
    for name, turns in found.items():
        rows += [
            (f"{label}, {name}: pairs/s", _measure.spread([turn["pairs_per_s"] for turn in turns], 2), count),
            ("  the reference's seconds included", _measure.spread([t["with_reference"] for t in turns], 2), count),
            ("  memory of a step, MB", _measure.spread([turn["step_mb"] for turn in turns]), count),
        ]
    ours, useful = found["ours"], [turn["useful_tflops"] for turn in found["ours"]]
    rows.append((f"{label}, ours: useful TFLOP/s", _measure.spread(useful, 3), count))
    if args.peak:
        rows.append(("  model FLOPs utilisation", _measure.spread([each / args.peak for each in useful], 3), count))
    ratios[f"sampo_vs_own_dpo/{label}"] = [turn["pairs_per_s"] / turn["dpo_pairs_per_s"] for turn in ours]
    if len(sides) > 2:
        default, best = found["trl_default"], found["trl_best"]
        ratios |= {
            f"pairs_per_s_vs_trl_default/{label}": over(ours, default, "with_reference"),
            f"pairs_per_s_vs_trl_best/{label}": over(ours, best, "pairs_per_s"),
            f"own_pairs_per_s_vs_trl_best/{label}": over(found["own"], best, "pairs_per_s"),
            f"step_memory_vs_trl_best/{label}": over(ours, best, "step_mb"),
        }


def one_turn(args: Namespace) -> dict[str, float]:
    """Seconds and memory of one side, after a step that warms it up."""
    if args.side == "own":
        args.attention = "own"
    if args.side in ("ours", "own"):
        return ours(args)
    settings = {} if args.side == "trl_default" else TRL_BEST | {"bf16": _training.device().type != "cpu"}
    return trl(args, {**settings, **json.loads(args.flags)})


def ours(args: Namespace) -> dict[str, float]:
    """Steps of SamPO, then the same of DPO, of one policy."""
    from transformers import AutoConfig

    from sampo_ray.config.losses import LOSSES, LossSettings
    from sampo_ray.training.batching import lengths_of, plan_round
    from sampo_ray.training.objective import Objective
    from sampo_ray.training.policy import load_policy, score_pairs
    from sampo_ray.training.reduction import REDUCTIONS

    device = _training.device()
    pairs, budget = _training.tokens_of(args), _training.budget_of(args)
    reference = load_policy(args.model, device=str(device), attention=args.attention).requires_grad_(False)
    score_pairs(reference, pairs if device.type == "cuda" else pairs[:2], budget)
    begun = now()
    pairs = score_pairs(reference, pairs, budget)
    reference_s = now() - begun
    del reference
    steps = list(plan_round(lengths_of(pairs), budget, epochs=1, seed=0, round=0))
    policy = load_policy(args.model, _training.CHECKPOINTING[args.checkpointing], attention=args.attention)
    policy.train().to(device)
    optimize: Optimize = (with_deepspeed if find_spec("deepspeed") else alone)(args, policy)
    sampo, dpo = (Objective(LOSSES["sigmoid"], LossSettings(0.1), REDUCTIONS[name]) for name in ("sample", "sum"))
    for step in _training.warming(steps):
        optimize(step, pairs, sampo)
        optimize(step, pairs, dpo)
    with Memory() as memory:
        begun = now()
        for step in steps:
            optimize(step, pairs, sampo)
        train_s = now() - begun
    begun = now()
    for step in steps:
        optimize(step, pairs, dpo)
    dpo_s = now() - begun
    useful = _training.useful_flops(AutoConfig.from_pretrained(args.model), pairs) / train_s / 1e12
    more = {"dpo_pairs_per_s": len(pairs) / dpo_s, "useful_tflops": useful}
    return figures(len(pairs), train_s, reference_s, memory) | more


def with_deepspeed(args: Namespace, policy: Any) -> "Optimize":
    """The step of a run."""
    import torch.distributed as dist

    from sampo_ray.config.run import RunConfig
    from sampo_ray.training.learner import Learner

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists
    device = _training.device()
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    tree = {
        "model": {"path": str(args.model), "attention": args.attention},
        "data": {"train": "unused", "max_length": args.max_length},
        "optim": {"batch_size": PAIRS_A_STEP, "learning_rate": LEARNING_RATE},
        "run": {"dir": "unused"},
    }
    learner = Learner(policy, RunConfig.model_validate(tree), device)
    learner.begin_round(0)

    def optimize(step: Any, pairs: list[Any], objective: Any) -> None:
        learner.objective = objective
        learner.optimize(step, pairs, step.index)

    return optimize


def alone(args: Namespace, policy: Any) -> "Optimize":
    """The same step where there is no DeepSpeed."""
    from sampo_ray.training.objective import Draw, LossInputs, MasterWeights, train_step

    weights = MasterWeights(policy)

    def optimize(step: Any, pairs: list[Any], objective: Any) -> None:
        train_step(policy, weights, step, pairs, LossInputs(objective, Draw(0, 0, 0)), LEARNING_RATE)

    return optimize


def trl(args: Namespace, settings: dict[str, Any]) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        """Watches all steps but the first, which warms up."""

        memory, begun, seconds = Memory(), 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.memory.__enter__()
                self.begun = now()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = now() - self.begun
            self.memory.__exit__()

    records = [
        {"prompt": text["prompt"]}
        | {side: [{"role": "assistant", "content": text[side]}] for side in ("chosen", "rejected")}
        for text in _training.texts_of(args)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            **{
                "output_dir": folder,
                "max_length": args.max_length,
                "max_steps": 1 + len(records) // PAIRS_A_STEP,
                "per_device_train_batch_size": PAIRS_A_STEP,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": _training.device().type == "cpu",
                **settings,
            }
        )
        begun = now()
        trainer = DPOTrainer(
            model=str(args.model),
            args=config,
            train_dataset=Dataset.from_list(records),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[clock],
        )
        reference_s = now() - begun if config.precompute_ref_log_probs else 0.0
        trainer.train()
    return figures(len(records), clock.seconds, reference_s, clock.memory)


def figures(pairs: int, train_s: float, reference_s: float, memory: Memory) -> dict[str, float]:
    with_reference = pairs / (train_s + reference_s)
    return {"pairs_per_s": pairs / train_s, "with_reference": with_reference, "step_mb": memory.beyond / 1e6}


if __name__ == "__main__":
    main()
