"""What the benchmarks of the train step share: models, pairs, a process for each turn, its memory and its FLOPs. They
run on the GPU where there is one, and need torch and transformers alone.
"""

import ctypes
import gc
import itertools
import json
import random
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _measure
import _rig

PAIRS_A_STEP = 8
CHECKPOINTING: dict[str, Any] = {"all": True, "selective": "selective", "none": False}
VOCABULARY = 128_256
LLAMA_1B: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
"""Shape of Llama-3.2-1B."""

MISTRAL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "sliding_window": 256,
}


def options(description: str, sides: Sequence[str]) -> ArgumentParser:
    parser = _measure.options(description, requests=48, repeats=3)
    parser.add_argument("--data", type=Path, help="preference pairs, JSON lines; default: made up")
    parser.add_argument(
        "--models", default="given,vocab128k", help="of given (needs --model), vocab128k, mistral and llama1b"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer at most")
    parser.add_argument("--attention", choices=("segments", "flex", "own"), default="segments", help="of our sides")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="all", help="of gradients, on our sides")
    parser.add_argument("--side", choices=sides, help="measures one side once and prints its figures")
    return parser


def run(
    name: str,
    parser: ArgumentParser,
    one_turn: Callable[[Namespace], dict[str, float]],
    compare: Callable[[tuple[str, str], Namespace, list[Any], dict[str, list[float]]], None],
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
            compare(model, args, rows, ratios)
    title = f"{name.replace('_', ' ')}, pairs of at most {args.max_length} tokens a side"
    _measure.show(title, ("what", "value", "count"), rows)
    _measure.report(name, ratios, {ratio: target_of(ratio) for ratio in ratios})


def models(args: Namespace, folder: Path) -> list[tuple[str, str]]:
    """Folder and name of each model to measure with; `given` only with `--model`."""
    made = {"vocab128k": vocab128k, "llama1b": llama1b, "mistral": mistral}
    kinds = [kind for kind in args.models.split(",") if kind in made or args.model]
    return [made[kind](folder) if kind in made else _rig.model_folder(args.model, folder) for kind in kinds]


def vocab128k(folder: Path) -> tuple[str, str]:
    """A small random Llama with as many tokens as Llama 3 has."""
    from transformers import AutoModelForCausalLM

    path, _ = _rig.model_folder(None, folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(VOCABULARY)
    return saved(model, path, folder / "vocab128k")


def llama1b(folder: Path) -> tuple[str, str]:
    """A random model of Llama-3.2-1B's shape."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    path, _ = _rig.model_folder(None, folder)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
    return saved(model, path, folder / "llama1b")


def mistral(folder: Path) -> tuple[str, str]:
    """A small random Mistral with a window."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    path, _ = _rig.model_folder(None, folder)
    model = AutoModelForCausalLM.from_config(MistralConfig(**MISTRAL), dtype=torch.bfloat16)
    return saved(model, path, folder / "mistral")


def saved(model: Any, tokenizer: str, folder: Path) -> tuple[str, str]:
    """Folder and name of a model with that tokenizer."""
    from sampo_ray.data.chat import ChatFormat

    model.save_pretrained(folder)
    ChatFormat.load(tokenizer, "llama3").save(folder)
    return str(folder), folder.name


def made_up(count: int, scale: float) -> Iterator[dict[str, str]]:
    """Pairs of random words; lengths log-normal, medians `scale` times those of UltraFeedback (130, 240 and 200)."""
    draw = random.Random(0)
    words = [*_rig.TOPICS, *_rig.FORMS, *_rig.READERS]

    def text(median: int) -> str:
        return " ".join(draw.choices(words, k=max(4, round(scale * median * draw.lognormvariate(0, 0.7)))))

    for _ in range(count):
        yield {"prompt": text(130), "chosen": text(240), "rejected": text(200)}


def texts_of(args: Namespace) -> Iterator[dict[str, Any]]:
    """The first pairs as text, the prompt as a list of messages."""
    if args.data is None:
        for pair in made_up(args.requests, args.max_length / 512):
            yield {**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]}
        return
    from sampo_ray.sources.rows import Counts, read_rows

    for row in itertools.islice(read_rows(str(args.data), "pairs", Counts()), args.requests):
        yield {"prompt": row.prompt, "chosen": row.chosen["content"], "rejected": row.rejected["content"]}


def tokens_of(args: Namespace) -> list[Any]:
    """The first pairs, those of a file tokenized as a run does it."""
    import numpy as np

    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.training.batching import Pair

    chat, longest, pairs = ChatFormat.load(str(args.model), "tokenizer"), args.max_length, []
    if args.data is not None:
        from sampo_ray.config.sections import DataConfig
        from sampo_ray.data.preferences import pairs_of, tokenized_pairs
        from sampo_ray.sources.rows import Counts, read_rows

        blocks = tokenized_pairs(read_rows(str(args.data), "pairs"), chat, DataConfig(max_length=longest), Counts())
        return list(itertools.islice((pair for block in blocks for pair in pairs_of(block)), args.requests))
    for index, text in enumerate(texts_of(args)):
        prompt = chat.prompt_ids(text["prompt"])[-(longest * 3 // 4) :]
        answers = (chat.response_ids(text[side])[: longest - len(prompt)] for side in ("chosen", "rejected"))
        pairs.append(Pair(str(index), *(np.array(ids, np.int32) for ids in (prompt, *answers))))
    return pairs


def budget_of(args: Namespace) -> Any:
    """What a run on one rank plans its rows for."""
    from sampo_ray.config.rows import RowBudget, default_row

    shared = args.attention != "own"
    return RowBudget(PAIRS_A_STEP, default_row(args.max_length), shared_prompts=shared)


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warming(turns: list[Any]) -> list[Any]:
    """Those to do once before any is measured: all on a GPU, where each new shape may mean a new kernel."""
    return turns if device().type == "cuda" else turns[:1]


def now() -> float:
    """Seconds (time.perf_counter) at which all that was asked of the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def useful_flops(config: Any, pairs: list[Any]) -> float:
    """Floating-point operations that a step over these pairs cannot do without: each prompt once, the head at the
    tokens that SamPO's masks keep, nothing computed again. A backward pass is two forward ones. `config`: the model's.
    """
    from sampo_ray.training.architecture import on_meta
    from sampo_ray.training.batching import lengths_of

    model = on_meta(config)
    shape = model.config
    linear = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    head = shape.vocab_size * shape.hidden_size
    attention = 2 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    total = 0.0
    for prompt, chosen, rejected in lengths_of(pairs).tolist():
        tokens, first = prompt + chosen + rejected, prompt + chosen
        seen = (first * (first + 1) + rejected * (rejected + 1)) / 2 + rejected * prompt
        total += 6 * (linear * tokens + head * 2 * min(chosen, rejected) + attention * seen)
    return total


def turns(
    script: str, sides: Sequence[str], model: tuple[str, str], args: Namespace, extra: Sequence[str] = ()
) -> tuple[dict[str, list[dict[str, float]]], int]:
    """The sides' figures, each turn measured in a new process, and how many pairs a turn had."""
    pairs = max(PAIRS_A_STEP, args.requests // args.repeats // PAIRS_A_STEP * PAIRS_A_STEP)
    path, label = model

    def side(name: str) -> Callable[[int], dict[str, float]]:
        def turn(_: int) -> dict[str, float]:
            how = ["--side", name, "--model", path, "--requests", str(pairs), *extra]
            how += ["--data", str(args.data)] if args.data else []
            how += ["--max-length", str(args.max_length), "--attention", args.attention]
            how += ["--checkpointing", args.checkpointing]
            done = subprocess.run([sys.executable, script, *how], stdout=subprocess.PIPE, text=True, check=True)
            result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            _measure.note(f"  {label}, {name}: {result}")
            return result

        return turn

    return _measure.take_turns({name: side(name) for name in sides}, args.repeats), pairs


def over(a: list[dict[str, float]], b: list[dict[str, float]], field: str) -> list[float]:
    return [x[field] / y[field] for x, y in zip(a, b, strict=True)]


class Memory:
    """The most memory inside the block beyond that at its begin, bytes: allocated on the GPU or, where there is none,
    resident (Linux).
    """

    beyond = 0

    def __enter__(self) -> "Memory":
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what comes
        self._before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        return self

    def __exit__(self, *_: Any) -> None:
        import torch

        most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
        self.beyond = most - self._before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
