"""What the benchmarks of the train step share: models, pairs, a process for each turn, and its memory."""

import ctypes
import gc
import json
import random
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _measure
import _rig
import pyarrow as pa

MAX_LENGTH = 512
PAIRS_A_STEP = 8
ROW = 4096
"""Tokens of a row of ours: as `trainer.tokens_per_row` is by default."""
VOCABULARY = 128_256


def options(description: str, sides: Sequence[str]) -> ArgumentParser:
    parser = _measure.options(description, requests=48, repeats=3)
    parser.add_argument("--data", type=Path, help="preference pairs, JSON lines; default: made up")
    parser.add_argument("--models", default="given,vocab128k", help="given (needs --model), vocab128k, or both")
    parser.add_argument("--side", choices=sides, help="measures one side once and prints its figures")
    return parser


def run(
    name: str,
    parser: ArgumentParser,
    one_turn: Callable[[Namespace], dict[str, float]],
    compare: Callable[[tuple[str, str], Namespace, Path, list[Any], dict[str, list[float]]], None],
    target_of: Callable[[str], _measure.Target],
) -> None:
    """Measures one side once (`--side`), or compares the sides on each model and reports all."""
    args = parser.parse_args()
    _rig.quiet()
    if args.side:
        print(json.dumps(one_turn(args)), flush=True)
        return
    rows: list[Any] = []
    ratios: dict[str, list[float]] = {}
    with _rig.scratch() as folder:
        for model in models(args, folder):
            compare(model, args, folder, rows, ratios)
    title = f"{name.replace('_', ' ')}, pairs of at most {MAX_LENGTH} tokens a side"
    _measure.show(title, ("what", "value", "count"), rows)
    _measure.report(name, ratios, {ratio: target_of(ratio) for ratio in ratios})


def models(args: Namespace, folder: Path) -> list[tuple[str, str]]:
    """Folder and name of each model to measure with; without `--model` vocab128k alone."""
    kinds = args.models.split(",") if args.model else ["vocab128k"]
    return [vocab128k(folder) if kind == "vocab128k" else _rig.model_folder(args.model, folder) for kind in kinds]


def vocab128k(folder: Path) -> tuple[str, str]:
    """A small random Llama with as many tokens as Llama 3 has."""
    from transformers import AutoModelForCausalLM

    from sampo_ray.chat import ChatFormat

    path, _ = _rig.model_folder(None, folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder / "vocab128k")
    ChatFormat.load(path, "llama3").save(folder / "vocab128k")
    return str(folder / "vocab128k"), "vocab128k"


def made_up(path: Path, count: int) -> Path:
    """Pairs of random words; lengths log-normal, medians about those of UltraFeedback (130, 240 and 200 words)."""
    draw = random.Random(0)
    words = [*_rig.TOPICS, *_rig.FORMS, *_rig.READERS]

    def text(median: int) -> str:
        return " ".join(draw.choices(words, k=max(4, round(median * draw.lognormvariate(0, 0.7)))))

    with path.open("w") as file:
        for index in range(count):
            record = {"id": f"pair-{index}", "prompt": text(130), "chosen": text(240), "rejected": text(200)}
            file.write(json.dumps(record) + "\n")
    return path


def tokens_of(model: str, data: Path, count: int) -> pa.Table:
    """The first pairs of a file, tokenized as a run does it."""
    from sampo_ray.chat import ChatFormat
    from sampo_ray.config import DataConfig
    from sampo_ray.preferences import Counts, tokenized_pairs

    settings = DataConfig(train=str(data), max_length=MAX_LENGTH)
    blocks = tokenized_pairs(str(data), ChatFormat.load(model, "tokenizer"), settings, Counts())
    return pa.concat_tables(blocks).slice(0, count)


def turns(
    script: str, sides: Sequence[str], model: tuple[str, str], args: Namespace, folder: Path, extra: Sequence[str] = ()
) -> tuple[dict[str, list[dict[str, float]]], int]:
    """The sides' figures, each turn measured in a new process, and how many pairs a turn had."""
    data = args.data or made_up(folder / "pairs.jsonl", 2 * args.requests)
    pairs = max(PAIRS_A_STEP, args.requests // args.repeats // PAIRS_A_STEP * PAIRS_A_STEP)
    path, label = model

    def side(name: str) -> Callable[[int], dict[str, float]]:
        def turn(_: int) -> dict[str, float]:
            how = ["--side", name, "--model", path, "--data", str(data), "--requests", str(pairs), *extra]
            done = subprocess.run([sys.executable, script, *how], stdout=subprocess.PIPE, text=True, check=True)
            result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            _measure.note(f"  {label}, {name}: {result}")
            return result

        return turn

    return _measure.take_turns({name: side(name) for name in sides}, args.repeats), pairs


def over(a: list[dict[str, float]], b: list[dict[str, float]], field: str) -> list[float]:
    return [x[field] / y[field] for x, y in zip(a, b, strict=True)]


class Memory:
    """The largest resident set inside the block beyond that at its begin, bytes (Linux)."""

    beyond = 0

    def __enter__(self) -> "Memory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what comes
        self._before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        return self

    def __exit__(self, *_: Any) -> None:
        self.beyond = resident("VmHWM") - self._before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
