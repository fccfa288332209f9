"""Training: pairs a second and memory of our step against TRL's `DPOTrainer`, on the same pairs, token by token.

Each measurement is a process of its own: it loads the model, takes one step on short pairs (after which the moments
exist), and then trains on the pairs. The time is that of the reference pass and the training; the memory is the peak of
the resident set while training, above what was resident before it. The reference of TRL's defaults is a second model;
its best flags here precompute it: fp32 where the CPU has no bf16, no gradient checkpointing, a pair at a time (so that
pairs are not padded to each other).

Needs TRL (1.16 was used). `--data` is any preference file; without it lengths are made up.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from _measure import Target

MAX_LENGTH = 1024
SIDES = ("sampo", "dpo", "trl_best", "trl_default")
TARGETS = {
    "pairs_per_s_vs_trl_default": Target(at_least=3.0),
    "pairs_per_s_vs_trl_best": Target(at_least=2.0),
    "step_memory_vs_trl_best": Target(at_most=0.5),
    "sampo_vs_own_dpo": Target(at_least=1.0),
}
LLAMA3_VOCABULARY = 128_256


@dataclass
class Measured:
    """`reference_s` and `train_s`: seconds; `memory`: bytes above those resident before."""

    pairs: int
    reference_s: float
    train_s: float
    memory: int

    @property
    def rate(self) -> float:
        return self.pairs / (self.reference_s + self.train_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: only the tiny model of 128k tokens")
    parser.add_argument("--data", help="preference pairs; default: made-up ones")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a measurement")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        measure = measure_ours if asked.side in ("sampo", "dpo") else measure_trl
        print(json.dumps(asdict(measure(asked.side, asked.model, asked.folder, asked.batch))))
        return
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="sampo-bench-") as scratch:
        for model, folder in prepared(asked, Path(scratch)):
            ratios |= compare(model, folder, asked)
    _measure.report("train_step", ratios, {name: TARGETS[name.partition("/")[0]] for name in ratios})


def prepared(asked: argparse.Namespace, scratch: Path) -> list[tuple[Path, Path]]:
    """The models, each with a folder that has its pairs."""
    from sampo_ray.tiny import tiny_llama, tiny_tokenizer

    pairs, short = read_pairs(asked), made_up(asked.batch, longest=16)
    tokenizer = tiny_tokenizer(["a b c"] * 4)
    tiny = scratch / "vocab128k-model"
    model = tiny_llama(tokenizer, hidden=256, layers=4, vocabulary=LLAMA3_VOCABULARY, tied=True)
    model.save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    found = []
    for path, name in ((asked.model, "model"), (tiny, "vocab128k")):
        if path is not None:
            folder = scratch / (asked.model.name if name == "model" else name)
            folder.mkdir()
            pq.write_table(pairs, folder / "pairs.parquet")
            pq.write_table(short, folder / "short.parquet")
            found.append((path, folder))
    return found


def read_pairs(asked: argparse.Namespace) -> pa.Table:
    if asked.data is None or asked.model is None:
        return made_up(asked.pairs, longest=MAX_LENGTH // 2)
    from sampo_ray.chat import ChatFormat
    from sampo_ray.config import DataConfig
    from sampo_ray.preferences import Counts, tokenized_pairs

    chat, limits = ChatFormat.load(str(asked.model), "tokenizer"), DataConfig(max_length=MAX_LENGTH)
    first = next(tokenized_pairs(asked.data, chat, limits, Counts(), block_rows=asked.pairs))
    return first.select(["id", "prompt", "chosen", "rejected"])


def made_up(count: int, longest: int) -> pa.Table:
    """Random tokens; prompts and responses of 1/16 of `longest` to `longest` tokens, short ones more often."""
    rng = np.random.default_rng(0)

    def tokens() -> list[int]:
        return rng.integers(5, 200, int(longest / 16 ** rng.random())).tolist()

    return pa.table(
        {"id": [f"pair-{i}" for i in range(count)]}
        | {name: [tokens() for _ in range(count)] for name in ("prompt", "chosen", "rejected")}
    )


def compare(model: Path, folder: Path, asked: argparse.Namespace) -> dict[str, list[float]]:
    def side(name: str) -> Any:
        return lambda turn: in_process(name, model, folder, asked.batch)

    results = _measure.take_turns({name: side(name) for name in SIDES}, asked.repeats)
    rows = []
    for name, all_of in results.items():
        rates = _measure.spread([each.rate for each in all_of], 3)
        shares = _measure.spread([each.reference_s / (each.reference_s + each.train_s) for each in all_of], 2)
        rows.append((name, rates, shares, _measure.spread([each.memory / 2**20 for each in all_of])))
    _measure.show(folder.name, ("side", "pairs/s", "share of reference", "peak MiB above start"), rows)
    turns = [dict(zip(results, turn, strict=True)) for turn in zip(*results.values(), strict=True)]
    return {
        f"pairs_per_s_vs_trl_default/{folder.name}": [t["sampo"].rate / t["trl_default"].rate for t in turns],
        f"pairs_per_s_vs_trl_best/{folder.name}": [t["sampo"].rate / t["trl_best"].rate for t in turns],
        f"step_memory_vs_trl_best/{folder.name}": [t["sampo"].memory / t["trl_best"].memory for t in turns],
        f"sampo_vs_own_dpo/{folder.name}": [t["sampo"].rate / t["dpo"].rate for t in turns],
    }


def in_process(side: str, model: Path, folder: Path, batch: int) -> Measured:
    command = [sys.executable, __file__, "--side", side, "--model", model, "--folder", folder, "--batch", batch]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


class Memory:
    """The peak of this process's resident set from here on, above what is resident now (Linux)."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._start = psutil.Process().memory_info().rss

    def above(self) -> int:
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return peak * 1024 - self._start


def measure_ours(side: str, model: Path, folder: Path, batch: int) -> Measured:
    import torch
    import torch.distributed as dist

    from sampo_ray.batching import lengths_of, plan_round
    from sampo_ray.learner import Learner
    from sampo_ray.policy import load_policy, score_pairs
    from sampo_ray.recipe import load_config

    os.environ["LOCAL_RANK"] = "0"
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=0, world_size=1)
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": "pairs", "max_length": MAX_LENGTH},
        "method": {"reduction": {"sampo": "sample", "dpo": "sum"}[side]},
        "optim": {"batch_size": batch},
        "trainer": {"gradient_checkpointing": False},
        "run": {"dir": "unused"},
    }
    config = load_config(recipe)
    learner = Learner(load_policy(model), config, torch.device("cpu"))

    def train(pairs: pa.Table) -> None:
        for step in plan_round(lengths_of(pairs), config.row_budget, epochs=1, seed=0, round=0):
            learner.optimize(step, pairs, 10)

    def referenced(name: str) -> pa.Table:
        return score_pairs(learner.policy, pq.read_table(folder / f"{name}.parquet"), config.row_budget)

    train(referenced("short"))
    begin = time.perf_counter()
    pairs = referenced("pairs")
    reference = time.perf_counter() - begin
    memory, begin = Memory(), time.perf_counter()
    train(pairs)
    seconds = time.perf_counter() - begin
    return Measured(len(pairs), reference, seconds, memory.above())


def measure_trl(side: str, model: Path, folder: Path, batch: int) -> Measured:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from sampo_ray.cpu import has_bf16

    best = {
        "bf16": has_bf16(),
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": batch,
    }
    spent: dict[str, float] = {"reference": 0.0}

    class SameTokens(DPOTrainer):
        """Takes token ids as they are, in order, and takes the time of the reference pass."""

        def _prepare_dataset(self, dataset: Dataset, *rest: Any, **more: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **more: Any) -> Dataset:
            begin = time.perf_counter()
            made = super()._precompute_ref_logps(*arguments, **more)
            spent["reference"] += time.perf_counter() - begin
            return made

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 1:
                self.memory, self.begin = Memory(), time.perf_counter()

    short, pairs = (pq.read_table(folder / f"{name}.parquet") for name in ("short", "pairs"))
    columns = {name: f"{name}_ids" for name in ("prompt", "chosen", "rejected")}
    table = pa.concat_tables([short, pairs], promote_options="permissive")
    first = AfterTheFirst()
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out,
            max_length=MAX_LENGTH,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **(best if side == "trl_best" else {"per_device_train_batch_size": batch}),
        )
        trainer = SameTokens(
            model=str(model),
            args=config,
            train_dataset=Dataset.from_dict({columns[name]: table[name].to_pylist() for name in columns}),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[first],
        )
        trainer.train()
        seconds = time.perf_counter() - first.begin
        return Measured(len(pairs), spent["reference"], seconds, first.memory.above())


if __name__ == "__main__":
    main()
