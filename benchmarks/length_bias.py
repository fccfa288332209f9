"""The paper's group study (Lu et al., EMNLP 2024, section 5) on a small model: which pairs teach length to whom.

Trains a chat model on pairs whose chosen answer is the longer one, the shorter one, or on any pairs, with DPO and with
SamPO, for some seeds; on any pairs also with SamPO whose masks of policy and reference are independent. Each cell is a
line of cells.jsonl, so a study that was cut off goes on where it was; tables and plot are written after each.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _measure
import _rig
import fsspec
import numpy as np

from sampo_ray.run.lines import append, records
from sampo_ray.run.storage import Place

MAX_LENGTH = 512
BATCH, EVERY = 12, 5
LEARNING_RATE, BETA = 1e-5, 0.1
ANSWER_TOKENS, CONTEXT = 512, 2048
SUBSETS = ("long", "short", "all")
METHODS = {"dpo": ("sum", "shared"), "sampo": ("sample", "shared"), "independent": ("sample", "independent")}
"""Reduction and mask."""
KINDS = ("longer", "shorter")
"""Held-out pairs, by what the chosen answer is."""

Cell = dict[str, Any]
"""A line of cells.jsonl. `curve`: held-out rewards over steps; `steps`: the training's; `pairs`: of each held-out pair
the tokens that chosen has more than rejected, and the margin at the end (summed log-ratios, nats); `answers`: tokens.
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a chat model")
    parser.add_argument("--train", type=Path, required=True, help="preference pairs, JSON lines")
    parser.add_argument("--held-out", type=Path, required=True, help="preference pairs, JSON lines")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `instruction` (AlpacaEval's)")
    parser.add_argument("--out", type=Path, default=Path("docs/length_bias"), help="folder of cells, tables and plot")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=300, help="training pairs of a cell")
    parser.add_argument("--held-out-pairs", type=int, default=50, help="of each kind: chosen longer, chosen shorter")
    parser.add_argument("--answers", type=int, default=100, help="prompts that are answered")
    parser.add_argument("--group", help="runs what is missing of one subset/seed, or `base`")
    args = parser.parse_args()
    _rig.quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.group:
        run_group(args)
        return
    # Seed by seed, so that a part of the study is a whole one with fewer seeds.
    for group in ("base", *(f"{subset}/{seed}" for seed in range(args.seeds) for subset in SUBSETS)):
        if missing(args, group):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--group", group], check=True)
    report(args)


def done(args: Namespace) -> dict[str, Cell]:
    path = args.out / "cells.jsonl"
    return {cell["cell"]: cell for cell in records(path.read_bytes() if path.exists() else b"", path.name)}


def missing(args: Namespace, group: str) -> list[str]:
    if group == "base":
        cells = [group]
    else:
        cells = [f"{group}/{method}" for method in METHODS if method != "independent" or group.startswith("all/")]
    return [cell for cell in cells if cell not in done(args)]


def run_group(args: Namespace) -> None:
    """The cells of a subset and seed start from the same reference log-probs: one process computes them once."""
    study = None
    for name in missing(args, args.group):
        _measure.note(name)
        if name == "base":
            cell: Cell = {"answers": answers(args, args.model)}
        else:
            study = study or Group(args)
            cell = study.cell(name.split("/")[-1])
        append(Place(str(args.out / "cells.jsonl")), json.dumps({"cell": name, **cell}))
        report(args)


class Group:
    """The training pairs of a subset and seed and the held-out pairs, with their log-probs under the model itself."""

    def __init__(self, args: Namespace) -> None:
        import torch.distributed as dist

        from sampo_ray.training.policy import load_policy, score_pairs

        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        subset, seed = args.group.split("/")
        self.args, self.seed = args, int(seed)
        config = self.config("dpo")
        model = load_policy(args.model)
        train = chosen_from(tokenized(args.train, config), subset, self.seed, args.pairs)
        self.train = score_pairs(model, train, config.row_budget)
        self.held_out = of_each_kind(tokenized(args.held_out, config), args.held_out_pairs)
        self.before = score_pairs(model, self.held_out, config.row_budget)

    def config(self, method: str) -> Any:
        from sampo_ray.config.run import RunConfig

        reduction, mask = METHODS[method]
        return RunConfig.model_validate(
            {
                "model": {"path": str(self.args.model)},
                "data": {"train": str(self.args.train), "max_length": MAX_LENGTH},
                "method": {"reduction": reduction, "mask": mask, "beta": BETA},
                "optim": {"batch_size": BATCH, "learning_rate": LEARNING_RATE},
                "run": {"dir": "unused", "seed": self.seed},
            }
        )

    def cell(self, method: str) -> Cell:
        """Trains and says what became of the held-out pairs, and of the answers."""
        import torch

        from sampo_ray.run.version_files import write_version
        from sampo_ray.run.versions import VersionInfo
        from sampo_ray.training.batching import lengths_of, plan_round
        from sampo_ray.training.learner import Learner
        from sampo_ray.training.policy import load_policy, score_pairs

        gc.collect()  # the learner of the cell before is in cycles
        config = self.config(method)
        budget = config.row_budget
        learner = Learner(load_policy(self.args.model, gradient_checkpointing=True), config, torch.device("cpu"))
        learner.begin_round(0)
        plan = list(plan_round(lengths_of(self.train), budget, epochs=1, seed=self.seed, round=0))
        after, curve, steps = self.before, [{"step": 0, **self.rewards(self.before)}], []
        for step in plan:
            result = learner.optimize(step, self.train, len(plan))
            steps.append({name: result.get(name) for name in ("loss", "margin", "grad_norm")})
            _measure.note(f"  {step.index}/{len(plan)}: {steps[-1]}")
            if step.index % EVERY == 0 or step.index == len(plan):
                after = score_pairs(learner.policy, self.held_out, budget)
                curve.append({"step": step.index, **self.rewards(after)})
        pairs = zip(differences(self.held_out).tolist(), self.margins(after).round(4).tolist(), strict=True)
        with _rig.scratch() as folder:
            info = VersionInfo(version=0, round=0, step=len(plan))
            weights = ((name, weight.bfloat16()) for name, weight in learner.masters())
            write_version(str(folder / "model"), weights, str(self.args.model), info)
            found = answers(self.args, folder / "model")
        return {"curve": curve, "steps": steps, "pairs": list(pairs), "answers": found}

    def rewards(self, after: Any) -> dict[str, float]:
        """Means over held-out pairs of a kind: log-ratio sums of both sides (nats), their difference, its sign."""
        margins, found = self.margins(after), dict[str, float]()
        longer = differences(self.held_out) > 0
        for kind, where in zip(KINDS, (longer, ~longer), strict=True):
            for side in ("chosen", "rejected"):
                found[f"{kind}/{side}"] = float(self.log_ratios(after, side)[where].mean())
            found[f"{kind}/margin"] = float(margins[where].mean())
            found[f"{kind}/accuracy"] = float((margins[where] > 0).mean())
        return found

    def margins(self, after: Any) -> np.ndarray:
        return self.log_ratios(after, "chosen") - self.log_ratios(after, "rejected")

    def log_ratios(self, after: Any, side: str) -> np.ndarray:
        """Summed over the answer, nats: the implicit reward in units of beta."""
        new, old = (np.array([sum(getattr(pair, f"{side}_ref")) for pair in of]) for of in (after, self.before))
        return new - old


def tokenized(path: Path, config: Any) -> list[Any]:
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.data.preferences import pairs_of, tokenized_pairs
    from sampo_ray.sources.rows import Counts, read_rows

    chat = ChatFormat.load(str(config.model.path), "tokenizer")
    blocks = tokenized_pairs(read_rows(str(path), "pairs"), chat, config.data, Counts())
    return [pair for block in blocks for pair in pairs_of(block)]


def differences(pairs: list[Any]) -> np.ndarray:
    """Tokens that chosen has more than rejected."""
    from sampo_ray.training.batching import lengths_of

    lengths = lengths_of(pairs)
    return lengths[:, 1] - lengths[:, 2]


def chosen_from(pairs: list[Any], subset: str, seed: int, count: int) -> list[Any]:
    longer = differences(pairs)
    where = {"long": longer > 0, "short": longer < 0, "all": longer == longer}[subset]
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(where))[:count]
    if len(drawn) < count:
        sys.exit(f"{len(drawn)} training pairs are {subset}, of {count} asked for: give fewer --pairs, or more data")
    return [pairs[index] for index in drawn]


def of_each_kind(pairs: list[Any], count: int) -> list[Any]:
    longer = differences(pairs)
    kinds = np.flatnonzero(longer > 0)[:count], np.flatnonzero(longer < 0)[:count]
    return [pairs[index] for index in np.concatenate(kinds)]


def answers(args: Namespace, model: Path) -> list[int]:
    """Tokens of greedy answers to the prompts, by vLLM in a process of its own."""
    code = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "from sampo_ray.actors.policy.deployment import cpu_engine\n"
        "from sampo_ray.data.chat import ChatFormat\n"
        "model, given, tokens, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])\n"
        "chat = ChatFormat.load(given, 'tokenizer')\n"
        "asked = [{'prompt_token_ids': chat.prompt_ids(json.loads(line))} for line in sys.stdin]\n"
        "how = SamplingParams(temperature=0, max_tokens=tokens, stop_token_ids=[chat.end_of_turn_id])\n"
        "engine = {**cpu_engine(context), 'distributed_executor_backend': 'uni'}\n"
        "llm = LLM(model, tokenizer=given, max_model_len=context, **engine)\n"
        "found = llm.generate(asked, how, use_tqdm=False)\n"
        "print(json.dumps([len(each.outputs[0].token_ids) for each in found]))\n"
    )
    with fsspec.open(args.prompts, "rt", compression="infer") as file:
        rows = [json.loads(line) for _, line in zip(range(args.answers), file, strict=False)]
    turns = "\n".join(json.dumps([{"role": "user", "content": row["instruction"]}]) for row in rows)
    how = [sys.executable, "-c", code, str(model), str(args.model), str(ANSWER_TOKENS), str(CONTEXT)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    run = subprocess.run(how, input=turns, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: list[int] = json.loads(run.stdout.splitlines()[-1])
    return found


def report(args: Namespace) -> None:
    """Writes table.md and margins.svg of the cells that there are."""
    cells = done(args)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for name, cell in cells.items():
        if name != "base":
            subset, _, method = name.split("/")
            groups.setdefault((subset, method), []).append(cell)
    pairs = f"{args.pairs} pairs, batches of {BATCH}, learning rate {LEARNING_RATE}, beta {BETA}, {args.model.name}"
    lines = [
        f"{pairs}. Margins: summed log-ratios of held-out pairs, chosen minus rejected, nats. In brackets: lowest and"
        " highest of the seeds; of differences 95 % intervals over held-out pairs or prompts, seeds averaged. Slope: of"
        " the margin on the tokens that chosen has more than rejected. Batches' margins, SD: how much the mean margin"
        " of a batch varied over the steps of training; gradient norm: its mean before clipping.",
        "",
        "| trained on | method | seeds | margin, chosen longer | margin, chosen shorter | accuracy, longer "
        "| accuracy, shorter | answer tokens | batches' margins, SD | gradient norm |",
        f"|{' --- |' * 10}",
    ]
    if "base" in cells:
        lines.append(f"| nothing | | | | | | | {statistics.mean(cells['base']['answers']):.0f} | | |")
    order = [(subset, method) for subset in SUBSETS for method in METHODS if (subset, method) in groups]
    for subset, method in order:
        group = groups[subset, method]
        ends = [cell["curve"][-1] for cell in group]
        held_out = [seeds([end[f"{kind}/{what}"] for end in ends]) for what in ("margin", "accuracy") for kind in KINDS]
        tokens = seeds([statistics.mean(cell["answers"]) for cell in group], 0)
        batches = seeds([statistics.stdev(step["margin"] / BETA for step in cell["steps"]) for cell in group])
        norms = seeds([statistics.mean(step["grad_norm"] for step in cell["steps"]) for cell in group], 1)
        row = [subset, method, str(len(group)), *held_out, tokens, batches, norms]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", *compared(groups, cells["base"]["answers"])] if "base" in cells else []
    (args.out / "table.md").write_text("\n".join([*lines, ""]))
    plot(args.out / "margins.svg", groups)


def seeds(values: Sequence[float], digits: int = 2) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.mean(values), max(values)))
    return f"{middle} ({low} to {high})"


def compared(groups: dict[tuple[str, str], list[Cell]], answers_before: list[int]) -> list[str]:
    """The table of what a training changed, and of what it changed more than another."""
    lines = [
        "| trained on | difference | margin | margin, chosen longer | margin, chosen shorter | slope, nats a token "
        "| answer tokens |",
        f"|{' --- |' * 7}",
    ]
    made = {which: averaged(group) for which, group in groups.items()}
    for (subset, _), (x, margins, _) in list(made.items()):
        made[subset, "before"] = x, np.zeros_like(margins), np.array(answers_before)  # log-ratios to the model itself
    two = (("dpo", "before"), ("sampo", "before"), ("sampo", "dpo"), ("independent", "sampo"))
    for subset, a, b in ((subset, *methods) for subset in SUBSETS for methods in two):
        if (subset, a) in made and (subset, b) in made:
            (x, margins, tokens), (_, other_margins, other_tokens) = made[subset, a], made[subset, b]
            apart = margins - other_margins
            kinds = [mean(pairs) for pairs in (apart, apart[x > 0], apart[x < 0])]
            row = [subset, f"{a} - {b}", *kinds, slope(x, apart), mean(tokens - other_tokens, 0)]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def averaged(group: list[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length differences of the held-out pairs; averaged over seeds, their margins, and each answer's tokens."""
    margins = np.mean([[margin for _, margin in cell["pairs"]] for cell in group], axis=0)
    tokens = np.mean([cell["answers"] for cell in group], axis=0)
    return np.array([difference for difference, _ in group[0]["pairs"]], float), margins, tokens


def mean(values: np.ndarray, digits: int = 2) -> str:
    middle, error = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return f"{middle:.{digits}f} ({middle - error:.{digits}f} to {middle + error:.{digits}f})"


def slope(x: np.ndarray, y: np.ndarray) -> str:
    """Least squares of y on x, with its normal 95 % interval."""
    centred = x - x.mean()
    rate = (centred @ y) / (centred @ centred)
    rest = y - y.mean() - rate * centred
    error = 1.96 * np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred))
    return f"{rate:.4f} ({rate - error:.4f} to {rate + error:.4f})"


def plot(path: Path, groups: dict[tuple[str, str], list[Cell]]) -> None:
    """Held-out margins over steps (Figure 3's shape): mean, lowest and highest of the seeds."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "length_bias", "svg.fonttype": "none"})  # the same file of the same cells
    figure, axes = plt.subplots(len(KINDS), len(SUBSETS), figsize=(12, 6), sharex=True, sharey=True)
    for row, kind in enumerate(KINDS):
        for axis, subset in zip(axes[row], SUBSETS, strict=True):
            axis.set_title(f"trained on {subset}; held out: chosen {kind}", fontsize=9)
            axis.axhline(0, color="grey", linewidth=0.5)
            for method in METHODS:
                if group := groups.get((subset, method)):
                    curves = np.array([[at[f"{kind}/margin"] for at in cell["curve"]] for cell in group])
                    steps = [at["step"] for at in group[0]["curve"]]
                    (line,) = axis.plot(steps, curves.mean(axis=0), label=method)
                    axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), alpha=0.2, color=line.get_color())
    axes[0][-1].legend(fontsize=8, loc="lower right")
    axes[-1][0].set_xlabel("optimizer steps")
    axes[0][0].set_ylabel("margin, nats")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
