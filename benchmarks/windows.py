"""What a sliding window costs in rows of pairs: forward and backward passes of a model with one, against the same model
with full attention. `--models mistral` is a small random one of eight layers, whose window is 256 tokens.
"""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import _measure
import _training
from _measure import Target
from _training import Memory, now, over
from ablation import passes

SIDES = ("full", "window")


def main() -> None:
    parser = _training.options(__doc__.splitlines()[0], SIDES)
    parser.set_defaults(models="mistral", max_length=1024)
    _training.run("windows", parser, one_turn, compare, lambda _: Target(at_most=1.15))


def compare(model: tuple[str, str], args: Namespace, rows: list[Any], ratios: dict[str, list[float]]) -> None:
    found, pairs = _training.turns(__file__, SIDES, model, args)
    label, count = model[1], f"{args.repeats} x {pairs} pairs"
    for name, turns in found.items():
        rows += [
            (f"{label}, {name}: pairs/s", _measure.spread([turn["pairs_per_s"] for turn in turns], 2), count),
            ("  memory beyond weights, MB", _measure.spread([turn["step_mb"] for turn in turns]), count),
        ]
    ratios[f"time_with_window_vs_full/{label}"] = over(found["full"], found["window"], "pairs_per_s")


def one_turn(args: Namespace) -> dict[str, float]:
    import torch

    from sampo_ray.training.policy import batch_rows, load_policy

    checkpointing, pairs = _training.CHECKPOINTING[args.checkpointing], _training.tokens_of(args)
    with tempfile.TemporaryDirectory() as name:
        folder = args.model if args.side == "window" else without_window(args.model, Path(name))
        policy = load_policy(folder, checkpointing, str(_training.device()), attention=args.attention).train()
    rows = [[pairs[i] for i in row] for batch in batch_rows(pairs, _training.budget_of(args)) for row in batch]
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for row in _training.warming(rows):
        passes(policy, row, "all")
    with Memory() as memory:
        begun = now()
        for row in rows:
            passes(policy, row, "all")
        seconds = now() - begun
    return {"pairs_per_s": len(pairs) / seconds, "step_mb": memory.beyond / 1e6}


def without_window(model: Path, folder: Path) -> Path:
    """The same weights with a configuration that has no window."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text()) | {"sliding_window": None}
    config.pop("layer_types", None)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
