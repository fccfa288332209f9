"""What the training core does on a GPU, checked and measured in at most eight minutes.

It needs torch and transformers alone:

    PYTHONPATH=CHECKOUT python benchmarks/gpu.py

Each section has seconds of its own and stops between two measurements when they are over; one that fails leaves the
others' results. LoRA needs peft, `overlap` DeepSpeed and two GPUs: where they are missing the line says so. On a CPU,
`--device cpu --shape tiny` tries the script itself.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import _measure
import numpy as np
import torch
import torch.multiprocessing as mp
from _training import LLAMA_1B, useful_flops
from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA_1B
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": LLAMA_1B,
    "3b": LLAMA_1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "A10": 125}
"""Dense bf16 TFLOP/s by what a device is called, the longest first that fits."""
STEP_PAIRS = 16
KINDS = ("segments", "flex")


class Clock:
    """The seconds that a section has left."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self._until


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all sections are told."""

    device: torch.device
    shape: str
    lengths: tuple[int, ...]
    peak: float | None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kinds(self) -> tuple[str, ...]:
        """FlexAttention has no backward pass on CPUs."""
        return KINDS if self.on_gpu else KINDS[:1]

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """The median of some repeats, after one that warms up."""
        work()
        taken = []
        for _ in range(repeats):
            begun = self.now()
            work()
            taken.append(self.now() - begun)
        return sorted(taken)[len(taken) // 2]

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.on_gpu else None

    def policy(
        self, shape: str, kind: str, lora: bool = False, dtype: torch.dtype = torch.bfloat16, **more: Any
    ) -> Any:
        """A random policy, the same for each `kind` of attention."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        from sampo_ray.training.policy import policy_on

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.float32).to(dtype)
        adapters: Any = SimpleNamespace(rank=16, alpha=32, targets="all-linear", scaled_by=32) if lora else None
        return policy_on(model, lora=adapters, attention=kind, **more).to(self.device).train()


def random_pairs(count: int, longest: int, vocabulary: int, seed: int = 0) -> list[Any]:
    """Pairs with lengths like those of preference data, a median of about a third of `longest` a side."""
    from sampo_ray.training.batching import Pair

    draw, ids = random.Random(seed), np.random.default_rng(seed)

    def some(median: float, most: int) -> Any:
        return ids.integers(0, vocabulary, max(4, min(most, int(median * draw.lognormvariate(0, 0.6))))).astype(
            np.int32
        )

    return [
        Pair(f"{seed}-{index}", some(longest / 8, longest // 3), *(some(longest / 3, longest * 2 // 3) for _ in "cr"))
        for index in range(count)
    ]


def one_row(tokens: int, vocabulary: int) -> list[Any]:
    """Pairs that fill a row of about so many tokens: as many as fit with answers of up to an eighth of it."""
    pairs, used = [], 0
    for pair in random_pairs(64, max(tokens // 4, 32), vocabulary, seed=tokens):
        used += sum(map(len, (pair.prompt, pair.chosen, pair.rejected)))
        if pairs and used > tokens:
            break
        pairs.append(pair)
    return pairs


def forward(policy: Any, pairs: list[Any], device: torch.device) -> Tensor:
    """Log-probs of all response tokens of a row, chosen and rejected by turns."""
    from sampo_ray.training.batching import assemble
    from sampo_ray.training.policy import every_token, pair_logprobs

    chosen, rejected = pair_logprobs(policy, assemble(pairs).to(device), every_token(pairs))
    return torch.cat([each for both in zip(chosen, rejected, strict=True) for each in both])


def gradients(policy: Any, pairs: list[Any], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the gradients of their mean, as they are."""
    logprobs = forward(policy, pairs, device)
    logprobs.mean().backward()
    found = [p.grad for p in policy.parameters() if p.grad is not None]
    policy.zero_grad(set_to_none=True)
    return logprobs.detach(), found


def check_attention(bench: Bench, clock: Clock) -> Iterator[dict[str, Any]]:
    """Errors of each kind against plain attention in fp32, as multiples of plain attention's own error in bf16."""
    for tokens in bench.lengths:
        pairs = one_row(tokens, SHAPES[bench.shape]["vocab_size"])
        truth, slopes = gradients(bench.policy(bench.shape, "own", dtype=torch.float32), pairs, bench.device)
        errors = {}
        for kind in ("own", *bench.kinds):
            logprobs, own = gradients(bench.policy(bench.shape, kind), pairs, bench.device)
            apart = sum(float((a.float() - b).square().sum()) for a, b in zip(own, slopes, strict=True))
            size = sum(float(b.square().sum()) for b in slopes)
            errors[kind] = float((logprobs - truth).abs().max()), (apart / size) ** 0.5
            del own
        del slopes
        base = errors["own"]
        yield {"tokens": tokens, "pairs": len(pairs), "bf16": [f"{each:.2e}" for each in base]} | {
            kind: {"logprobs": round(errors[kind][0] / base[0], 3), "gradients": round(errors[kind][1] / base[1], 3)}
            for kind in bench.kinds
        }
        if clock.over():
            return


def find_crossover(bench: Bench, clock: Clock) -> Iterator[dict[str, Any]]:
    """Milliseconds of a row's passes, forward and backward, with each kind of attention."""
    rows = {tokens: one_row(tokens, SHAPES[bench.shape]["vocab_size"]) for tokens in bench.lengths}
    taken: dict[int, dict[str, float]] = {tokens: {} for tokens in rows}
    for kind in ("own", *bench.kinds):
        policy = bench.policy(bench.shape, kind, gradient_checkpointing=True)

        def passes(pairs: list[Any], policy: Any = policy) -> None:
            forward(policy, pairs, bench.device).mean().backward()
            policy.zero_grad(set_to_none=True)

        for tokens, pairs in rows.items():
            taken[tokens][kind] = round(1e3 * bench.seconds(lambda pairs=pairs: passes(pairs)), 1)
            if clock.over():
                break
        del policy
    for tokens, kinds in taken.items():
        yield {"tokens": tokens, **{f"{kind}_ms": value for kind, value in kinds.items()}}


def measure_steps(bench: Bench, shape: str, clock: Clock, lora: bool = False) -> Iterator[dict[str, Any]]:
    """Optimizer steps of SamPO: pairs and tokens a second, utilisation on useful FLOPs, and peak memory. With adapters
    the frozen weights need no gradients, which is a third of the FLOPs."""
    from transformers import LlamaConfig

    longest = max(bench.lengths) // 4
    pairs = random_pairs(STEP_PAIRS, longest, SHAPES[shape]["vocab_size"])
    tokens = sum(len(each) for pair in pairs for each in (pair.prompt, pair.chosen, pair.rejected))
    modes: list[Any] = [True, "selective", False] if not lora else [True, "selective"]
    for mode, kind in itertools.product(modes, bench.kinds):
        if mode == "selective" and kind == "flex":  # a run refuses it
            continue
        label = {"checkpointing": mode, "attention": kind}
        try:
            policy = bench.policy(shape, kind, lora=lora, gradient_checkpointing=mode)
            seconds = bench.seconds(stepper(policy, pairs, longest, bench.device))
        except torch.OutOfMemoryError:
            yield label | {"out_of_memory": True}
            continue
        finally:
            policy = None
        useful = useful_flops(LlamaConfig(**SHAPES[shape]), pairs) * (2 / 3 if lora else 1) / seconds / 1e12
        used = round(useful / bench.peak, 3) if bench.peak else None
        rates = {"pairs_per_s": round(len(pairs) / seconds, 2), "tokens_per_s": round(tokens / seconds)}
        yield label | rates | {"useful_tflops": round(useful, 3), "utilisation": used, "peak_gib": bench.peak_gib()}
        if clock.over():
            return


def stepper(policy: Any, pairs: list[Any], longest: int, device: torch.device) -> Callable[[], object]:
    """One optimizer step over the pairs, as a run computes it; the reference is the policy as it begins."""
    from sampo_ray.config.losses import LOSSES, LossSettings
    from sampo_ray.config.rows import RowBudget, default_row
    from sampo_ray.training.batching import lengths_of, plan_round
    from sampo_ray.training.objective import Draw, LossInputs, MasterWeights, Objective, train_step
    from sampo_ray.training.policy import score_pairs
    from sampo_ray.training.reduction import REDUCTIONS

    budget = RowBudget(len(pairs), default_row(longest), shared_prompts=policy.attention != "own")
    scored = score_pairs(policy, pairs, budget)
    weights, objective = MasterWeights(policy), Objective(LOSSES["sigmoid"], LossSettings(0.1), REDUCTIONS["sample"])
    (step,) = plan_round(lengths_of(scored), budget, epochs=1, seed=0, round=0)
    return lambda: train_step(policy, weights, step, scored, LossInputs(objective, Draw(0, 0, 0)), 1e-6)


def measure_optimizer(bench: Bench, clock: Clock) -> Iterator[dict[str, Any]]:
    """AdamW's step on fp32 masters of the shape: fused, and one parameter after the other in groups."""
    from transformers import LlamaConfig

    from sampo_ray.training.architecture import on_meta

    sizes = [parameter.shape for parameter in on_meta(LlamaConfig(**SHAPES[bench.shape])).parameters()]
    for settings in ({"fused": True}, {"foreach": True}):
        masters = [torch.nn.Parameter(torch.zeros(size, device=bench.device)) for size in sizes]
        for master in masters:
            master.grad = torch.ones_like(master)
        optimizer = torch.optim.AdamW(masters, 1e-6, **settings)
        seconds = bench.seconds(optimizer.step)
        moved = 28 * sum(master.numel() for master in masters)  # four values are read, three are written
        yield {
            "adamw": next(iter(settings)),
            "ms": round(1e3 * seconds, 2),
            "gb_per_s": round(moved / seconds / 1e9, 1),
        }
        del masters, optimizer
        if clock.over():
            return


def measure_overlap(bench: Bench, clock: Clock) -> Iterator[dict[str, Any]]:
    """A step under DeepSpeed on all GPUs (on a CPU: two ranks), by whether communication overlaps and its buckets."""
    import deepspeed  # noqa: F401  # else the section says that it is missing

    world = torch.cuda.device_count() if bench.on_gpu else 2
    if world < 2:
        yield {"skipped": "one GPU: there is nothing to overlap with"}
        return
    for overlap, bucket in itertools.product((False, True), (2**24, 2**26, 2**28) if bench.on_gpu else (2**24,)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with mp.Manager() as manager:
            found = manager.dict()
            mp.spawn(_rank, (world, port, bench, overlap, bucket, found), nprocs=world)
            yield {"overlap_comm": overlap, "bucket": bucket, "ranks": world, "step_ms": found["ms"]}
        if clock.over():
            return


def _rank(rank: int, world: int, port: int, bench: Bench, overlap: bool, bucket: int, found: Any) -> None:
    import torch.distributed as dist

    from sampo_ray.config.run import RunConfig
    from sampo_ray.training import learner

    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if bench.on_gpu:
        torch.cuda.set_device(rank)
        bench = dataclasses.replace(bench, device=torch.device("cuda", rank))
    dist.init_process_group("nccl" if bench.on_gpu else "gloo", rank=rank, world_size=world)
    tree = {"model": {"path": "-"}, "data": {"train": "-"}, "run": {"dir": "-"}, "optim": {"batch_size": STEP_PAIRS}}
    made = learner.deepspeed_config

    def changed(config: RunConfig, device: torch.device) -> dict[str, object]:
        tree: dict[str, Any] = made(config, device)
        zero = {**tree["zero_optimization"], "overlap_comm": overlap, "reduce_bucket_size": bucket}
        return {**tree, "zero_optimization": zero}

    learner.deepspeed_config = changed
    config = RunConfig.model_validate(tree)
    policy = bench.policy(bench.shape, "segments", gradient_checkpointing=True)
    learning = learner.Learner(policy, config, bench.device)
    learning.begin_round(0)
    work = _learning(learning, random_pairs(STEP_PAIRS, max(bench.lengths) // 4, SHAPES[bench.shape]["vocab_size"]))
    seconds = bench.seconds(work)
    if not rank:
        found["ms"] = round(1e3 * seconds, 1)
    dist.destroy_process_group()


def _learning(learning: Any, pairs: list[Any]) -> Callable[[], object]:
    from sampo_ray.training.batching import lengths_of, plan_round

    scored = learning.score(pairs)
    budget = dataclasses.replace(learning.config.row_budget, world=learning.world)
    (step,) = plan_round(lengths_of(scored), budget, epochs=1, seed=0, round=0)
    return lambda: learning.optimize(step, dict(enumerate(scored)), 1)


def peak_of(bench: Bench) -> float:
    """TFLOP/s of the device: what its maker says, else what products of large matrices were measured to do."""
    if bench.on_gpu:
        name = torch.cuda.get_device_name()
        if known := [peak for part, peak in PEAKS.items() if part in name]:
            return float(known[0])
    size = 8192 if bench.on_gpu else 512
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    return 2 * size**3 / bench.seconds(lambda: a @ a) / 1e12


Section = Callable[[Bench, Clock], Iterator[dict[str, Any]]]


def sections(large: str) -> dict[str, tuple[float, Section]]:
    """Each section's share of the time."""
    return {
        "attention": (0.30, check_attention),
        "crossover": (0.20, find_crossover),
        "step": (0.20, lambda bench, clock: measure_steps(bench, bench.shape, clock)),
        "lora": (0.15, lambda bench, clock: measure_steps(bench, large, clock, lora=True)),
        "optimizer": (0.05, measure_optimizer),
        "overlap": (0.10, measure_overlap),
    }


def ratios_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The worst errors, the shortest row at which flex wins, the best step and its utilisation."""
    ratios: dict[str, float] = {}
    for kind, what in itertools.product(KINDS, ("logprobs", "gradients")):
        if errors := [row[kind][what] for row in results["attention"] if kind in row]:
            ratios[f"{kind}_{what}_error"] = max(errors)
    wins = [row["tokens"] for row in results["crossover"] if row.get("flex_ms", 1e9) < row.get("segments_ms", 0.0)]
    if wins:
        ratios["flex_wins_from_tokens"] = min(wins)
    for name in ("step", "lora"):
        if done := [row for row in results[name] if "pairs_per_s" in row]:
            best = max(done, key=lambda row: row["pairs_per_s"])
            ratios[f"{name}_pairs_per_s"] = best["pairs_per_s"]
            ratios |= {f"{name}_utilisation": best["utilisation"]} if best["utilisation"] else {}
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the model for all but LoRA")
    parser.add_argument("--large", choices=SHAPES, default="3b", help="of the model with LoRA")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of the longest row, from 512 by doubling")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all sections together")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device; default: known by name, or measured")
    parser.add_argument("--only", help="sections, with commas between")
    args = parser.parse_args()
    lengths = tuple(512 << n for n in range(16) if 512 << n <= args.longest)
    bench = Bench(torch.device(args.device), args.shape, lengths, args.peak)
    bench = dataclasses.replace(bench, peak=args.peak or peak_of(bench))
    results: dict[str, list[dict[str, Any]]] = {}
    for name, (share, section) in sections(args.large).items():
        results[name] = []
        if args.only is None or name in args.only.split(","):
            run_section(name, section, bench, share * args.seconds, results[name])
    device = torch.cuda.get_device_name() if bench.on_gpu else "cpu"
    line = {
        "benchmark": "gpu",
        "device": device,
        "peak_tflops": round(bench.peak or 0.0, 2),
        "ratios": ratios_of(results),
    }
    line |= {"results": results, "machine": _measure.machine(), "versions": _measure.versions()}
    print(json.dumps(line), flush=True)


def run_section(name: str, section: Section, bench: Bench, seconds: float, rows: list[dict[str, Any]]) -> None:
    """Adds what a section finds to `rows`, and why it ended early, if so."""
    begun = time.monotonic()
    try:
        for row in section(bench, Clock(seconds)):
            rows.append(row)
            _measure.note(f"{name}: {json.dumps(row)}")
    except Exception as error:  # whatever it is, the other sections are worth their results
        rows.append({"error": f"{type(error).__name__}: {error}"[:500]})
        _measure.note(f"{name}: {traceback.format_exc()}")
    _measure.note(f"{name}: {time.monotonic() - begun:.0f} s of {seconds:.0f}")


if __name__ == "__main__":
    main()
