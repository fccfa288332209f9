"""How long ranks stop for a published version and for a checkpoint, here and in another checkout, by turns.

Two gloo ranks in processes of their own hold a Llama of 1B parameters' shape, with as many of its layers as they have
memory for, under ZeRO-2 and ZeRO-3. `--base FOLDER` names a checkout of commit 13108c0. The weight store answers at
once on both sides; that ranks put versions into the object store then is a copy of the bytes here, the least it is. A
copy of the bytes is measured in the same processes, by both ranks at once, between memory that was written before.

Ranks copy beside the passes of the next step. A stall is how long the training thread stops in all: as it begins, and
before the optimizer's step, where it waits for what is not copied yet. In between, passes keep a core of each rank
busy. On CPUs the copies take time from them, so in the steps of which the overhead is measured, which are sleeps, all
is waited for at once: as if passes stood still while something is copied.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import _measure
import _rig
import _training

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
HELD = 19
"""Bytes a parameter of a rank at most: weights 2, half of masters and moments 6, these again for a snapshot and half of
the weights for another, and what DeepSpeed has for a moment as it starts."""
STEP_S = 5.0
STEPS, PUBLISH_EVERY, CHECKPOINT_EVERY = 50, 10, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="a checkout of the earlier commit; default: this one alone")
    parser.add_argument("--layers", type=int, help="of the Llama's 16; default: what there is memory for")
    parser.add_argument("--repeats", type=int, default=3, help="versions and checkpoints of a side")
    parser.add_argument(
        "--step", type=float, default=2.0, help="seconds that a step sleeps, or its passes compute, for"
    )
    parser.add_argument("--rank", type=int, help="used by the benchmark itself")
    parser.add_argument("--side", choices=("ours", "base"))
    parser.add_argument("--stage", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(measure(args)), flush=True)
        return
    _rig.quiet()
    ratios: dict[str, list[float]] = {}
    rows: list[tuple[str, ...]] = []
    with _rig.scratch() as folder:
        parameters = make_model(folder, args)
        sides = ["ours", *(["base"] if args.base else [])]
        for stage in (2, 3):
            order = sides if stage == 2 else sides[::-1]
            found = {side: both_ranks(side, stage, folder, args) for side in order}
            compare(f"zero{stage}", found, ratios, rows)
    billions = parameters / 1e9
    _measure.show(f"{billions:.2f}B parameters, {RANKS} ranks", ("what", *_columns(rows)), rows)
    _measure.report("stall", ratios, {name: target_of(name) for name in ratios})


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    return ["seconds, the slower rank", "copies of its bytes", "bytes of a rank, GB"][: len(rows[0]) - 1]


def make_model(folder: Path, args: argparse.Namespace) -> int:
    """Writes the model, and returns how many parameters it has."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from sampo_ray.training.architecture import on_meta

    def shape(layers: int) -> Any:
        return LlamaConfig(**{**_training.LLAMA_1B, "num_hidden_layers": layers})

    available = available_memory()
    layers = args.layers or max(
        n for n in range(1, 17) if n == 1 or RANKS * HELD * on_meta(shape(n)).num_parameters() < 0.9 * available
    )
    model = AutoModelForCausalLM.from_config(shape(layers), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    _measure.note(
        f"{layers} of the 16 layers of Llama-3.2-1B's shape, {model.num_parameters() / 1e9:.2f}B parameters: what two "
        f"ranks have room for in the {available / 2**30:.1f} GiB that are free"
    )
    return int(model.num_parameters())


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def both_ranks(side: str, stage: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the ranks of one side measure, each in a new process."""
    _measure.note(f"ZeRO-{stage}: {side}")
    here = folder / f"{side}-{stage}"
    here.mkdir()
    checkout = ROOT if side == "ours" else args.base.resolve()
    path = f"{checkout}:{ROOT / 'benchmarks'}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    how = [sys.executable, __file__, "--side", side, "--stage", str(stage), "--folder", str(here)]
    how += ["--repeats", str(args.repeats), "--step", str(args.step)]
    started = [
        subprocess.Popen(
            [*how, "--rank", str(rank)], env={**env, "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank of {side} under ZeRO-{stage} failed")
    shutil.rmtree(here)
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    _measure.note(f"  {found}")
    return found


@dataclass(frozen=True)
class Side:
    """A rank of one checkout: what stops it, what the optimizer's step waits for, and what waits for all that goes on
    beside."""

    publish: Callable[[int], object]
    checkpoint: Callable[[int], object]
    before_step: Callable[[], object]
    wait: Callable[[], object]
    overtaken: Callable[[], int]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stop, of copies, and bytes, of one rank of one side."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{args.folder}/group", rank=args.rank, world_size=RANKS)
    if args.rank == 0:
        lay_out(args.folder)
    dist.barrier()
    side, states, shares = (ours if args.side == "ours" else base)(args)
    copies = {name: copy_seconds(size, args.repeats) for name, size in shares.items()}
    watch = Resident()
    stops: dict[str, list[float]] = {"publish": [], "checkpoint": []}
    whole: dict[str, list[float]] = {name: [] for name in stops}
    for turn in range(args.repeats):
        for name in stops:
            begun = stopped(getattr(side, name), turn + 1)
            passes(args.step)
            stops[name].append(begun + stopped(lambda _: side.before_step(), 0))
            side.wait()
            whole[name].append(at_once(side, name, turn + 1))
            side.wait()
    found = {"stops": stops, "whole": whole, "copies": copies, "shares": shares, "states": states}
    if args.side == "ours":
        lost = steps_with_stops(side, args)
        found |= {"lost": lost, "overtaken": side.overtaken()}
    return {**found, "peak": watch.peak()}


def lay_out(folder: Path) -> None:
    """A run directory's version 0: the model."""
    version = folder / "run" / "versions" / "000000"
    version.mkdir(parents=True)
    for file in (folder.parent / "model").iterdir():
        os.link(file, version / file.name)


def stopped(work: Callable[[int], object], step: int) -> float:
    """Seconds until the work returns, begun by all ranks at once."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    work(step)
    return time.perf_counter() - begun


def at_once(side: Side, name: str, step: int) -> float:
    """Seconds until the optimizer could step if there were no passes before."""

    def work(step: int) -> None:
        getattr(side, name)(step)
        side.before_step()

    return stopped(work, step)


def passes(seconds: float) -> None:
    """Computes for so long, as a step's passes do."""
    import torch

    layer, rows, end = torch.ones(2048, 2048), torch.ones(64, 2048), time.perf_counter() + seconds
    while time.perf_counter() < end:
        rows @ layer


def copy_seconds(nbytes: int, repeats: int) -> list[float]:
    """Seconds of copies between two ranges of memory of this size that were written before."""
    import torch

    piece = min(nbytes, 1 << 28)  # larger than any cache; a whole second range would take memory that is counted
    source, target = torch.ones(piece, dtype=torch.uint8), torch.ones(piece, dtype=torch.uint8)
    return [nbytes / piece * stopped(lambda _: target.copy_(source), 0) for _ in range(max(3, repeats))]


class Resident:
    """The most memory that this process has had at once since it was made, bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _training.resident("VmHWM")


def steps_with_stops(side: Side, args: argparse.Namespace) -> float:
    """Seconds that a rank stops for versions and checkpoints in the steps of a round's stretch. Each sleeps, for less
    than the 5 s that it stands for: so what is written beside is done in fewer steps than it has there."""
    lost = 0.0
    for step in range(1, STEPS + 1):
        time.sleep(args.step)
        if step % PUBLISH_EVERY == 0:
            lost += at_once(side, "publish", 100 + step)
        if step % CHECKPOINT_EVERY == 0:
            lost += at_once(side, "checkpoint", 100 + step)
    side.wait()
    return lost


def make_moments(learner: Any) -> None:
    """Makes what AdamW makes in its first step."""
    import torch

    optimizer = learner._engine.optimizer
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
    for master in optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups:
        moments = {name: torch.full_like(master, 1e-8, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.optimizer.state[master] = {"step": torch.zeros(()), **moments}


def tree_of(args: argparse.Namespace) -> dict[str, Any]:
    model = {"path": str(args.folder.parent / "model")}
    trainer = {"zero_stage": args.stage, "workers": RANKS, "checkpoint_every": 1}
    return {
        "model": model,
        "data": {"train": "pairs.jsonl", "max_length": 128},
        "trainer": trainer,
        "publish": {"every_steps": 1},
        "run": {"dir": str(args.folder / "run")},
    }


def ours(args: argparse.Namespace) -> tuple[Side, int, dict[str, int]]:
    """A rank of this checkout; bytes of its states, and of its shares of a version and of a checkpoint."""
    import torch.distributed as dist

    from sampo_ray.actors.ranks import publishing
    from sampo_ray.actors.ranks.exchange import RoundSpec
    from sampo_ray.actors.ranks.rank import Rank
    from sampo_ray.config.run import load_config
    from sampo_ray.run.directory import create_run, open_run
    from sampo_ray.run.manifest import StepMetrics

    publishing.tell = lambda *_: None
    config = load_config(tree_of(args))
    run = create_run(config) if args.rank == 0 else None
    dist.barrier()
    run = run or open_run(config.run.dir)
    spec: Any = RoundSpec(run.id, run.place, run.config, 0, 0, 1000, (), None)  # type: ignore[arg-type]
    rank = Rank(spec, None)  # type: ignore[arg-type]
    learner = rank.learner
    make_moments(learner)

    def publish(step: int) -> None:
        learner.step = step
        rank.publisher.publish(spec, learner, StepMetrics(0, step, step, {}), False)

    def checkpoint(step: int) -> None:
        learner.step = step
        rank.checkpointer.after_step(spec, learner, False)

    overtaken = SimpleNamespace(count=0)

    def wait() -> None:
        rank.background.wait()
        stored = rank.background.collect()
        if stored.troubles:
            raise SystemExit("; ".join(stored.troubles))
        overtaken.count += len(stored.overtaken)

    shares = {"publish": rank.publisher._buffer.nbytes, "checkpoint": rank.checkpointer._buffer.nbytes}
    states = _training.resident("VmRSS") - sum(shares.values())
    return Side(publish, checkpoint, learner.finish_copies, wait, lambda: overtaken.count), states, shares


def base(args: argparse.Namespace) -> tuple[Side, int, dict[str, int]]:
    """The same of commit 13108c0, where all is done when the methods return."""
    import torch.distributed as dist

    from sampo_ray.actors import weight_store
    from sampo_ray.actors.exchange import Work
    from sampo_ray.actors.rank import Rank
    from sampo_ray.recipe import load_config
    from sampo_ray.runs import create_run, open_run

    def put(bucket: Any) -> Any:
        bucket.data.copy()
        return bucket

    weight_store.put = put
    weight_store.ray = SimpleNamespace(get=lambda *_, **__: None)
    config = load_config(tree_of(args))
    run = create_run(config) if args.rank == 0 else None
    dist.barrier()
    run = run or open_run(config.run.dir)
    work = Work(run.id, run.place, run.config, 0, 0, 1000, (), None)
    rank = Rank(work, SimpleNamespace(publish=SimpleNamespace(remote=lambda *_: None)))

    make_moments(rank.learner)

    def publish(step: int) -> None:
        rank.learner.step = step
        rank._publish(work, step, False, {})

    def checkpoint(step: int) -> None:
        rank.learner.step = step
        rank._checkpoint(work)

    def nothing() -> None: ...

    return Side(publish, checkpoint, nothing, nothing, lambda: 0), _training.resident("VmRSS"), {}


def compare(
    stage: str, found: dict[str, list[dict[str, Any]]], ratios: dict[str, list[float]], rows: list[tuple[str, ...]]
) -> None:
    """Adds the ratios of one stage, and rows to show. What counts is the rank that stops for longer."""
    ranks = found["ours"]
    for name in ("publish", "checkpoint"):
        copies = max(median(rank["copies"][name]) for rank in ranks)
        stops = slower(ranks, name)
        ratios[f"{name}_stall_copies/{stage}"] = [stop / copies for stop in stops]
        share = max(rank["shares"][name] for rank in ranks)
        rows.append(row(f"{name}, {stage}, ours", stops, copies, share))
        rows.append(row(f"{name}, {stage}, without passes", slower(ranks, name, "whole"), copies, share))
        if "base" in found:
            theirs = slower(found["base"], name)
            ratios[f"{name}_stall_vs_13108c0/{stage}"] = [a / b for a, b in zip(theirs, stops, strict=True)]
            rows.append(row(f"{name}, {stage}, 13108c0", theirs, copies, share))
    lost = max(rank["lost"] for rank in ranks)
    ratios[f"step_overhead/{stage}"] = [1 + lost / (STEPS * STEP_S)]
    ratios[f"peak_memory/{stage}"] = [(rank["peak"] - sum(rank["shares"].values())) / rank["states"] for rank in ranks]
    if ranks[0]["overtaken"]:
        _measure.note(f"{stage}: {ranks[0]['overtaken']} versions were left out, as the one before was being written")


def slower(ranks: list[dict[str, Any]], name: str, kind: str = "stops") -> list[float]:
    return [max(stops) for stops in zip(*(rank[kind][name] for rank in ranks), strict=True)]


def row(what: str, stops: list[float], copies: float, share: int) -> tuple[str, ...]:
    return what, _measure.spread(stops, 3), f"{median(stops) / copies:.1f}", f"{share / 1e9:.2f}"


def target_of(name: str) -> _measure.Target:
    if "_vs_" in name:
        return _measure.Target(at_least=10)
    limits = {"publish_stall_copies": 1.5, "checkpoint_stall_copies": 3, "step_overhead": 1.03, "peak_memory": 1.25}
    return _measure.Target(at_most=limits[name.split("/")[0]])


if __name__ == "__main__":
    main()
