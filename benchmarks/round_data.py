"""What a round's pairs cost as they grow: memory of the driver, of a rank and of the object store, and seconds.

Synthetic pairs, tokenized, in parts as a run has them, are put in the order of a round, planned, and read through two
epochs as a rank reads them, without the computing. Each size runs in a process of its own, on a Ray of its own; so does
another checkout (`--against`), where sizes take turns.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure
from _measure import Target

TOKENS = 64, 32, 32
"""Of a prompt, a chosen and a rejected answer."""
PART, BATCH, EPOCHS, WORLD = 512, 128, 2, 2
STEPS = "reorder", "lengths", "first epoch", "second epoch"
MEMORY = "driver", "rank"
TARGETS = {
    "rank_memory_vs_tokens": Target(at_most=0.1),
    "driver_memory_vs_tokens": Target(at_most=0.1),
    "seconds_per_pair/LARGE_vs_SMALL": Target(at_most=1.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--against", type=Path, help="another checkout, for all sizes but the largest")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)), flush=True)
        return
    here, sizes = Path(__file__).resolve().parents[1], sorted(args.pairs)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for pairs in sizes:
        others = [("other", args.against)] if args.against and pairs < sizes[-1] else []
        for name, checkout in [("this", here), *others]:
            _measure.note(f"{pairs:,} pairs: {name}")
            found[name, pairs] = run(checkout, pairs)
            _measure.note(json.dumps(found[name, pairs]))
    columns = "pairs", *(f"{name}, MB" for name in MEMORY), *(f"{name}, s" for name in STEPS), "in all, ms/pair"
    rows = [
        (
            f"{pairs:,} ({name})",
            *(f"{figures[each]:,.0f}" for each in MEMORY),
            *(f"{figures[each]:,.1f}" for each in STEPS),
            f"{1e3 * seconds(figures) / pairs:.3f}",
        )
        for (name, pairs), figures in found.items()
    ]
    _measure.show("round_data", columns, rows)
    large, small = found["this", sizes[-1]], found["this", sizes[max(0, len(sizes) - 2)]]
    tokens_mb = sizes[-1] * sum(TOKENS) * 4 / 2**20  # of lengths and orders both hold some bytes a pair
    ratios = {f"{name}_memory_vs_tokens": [large[name] / tokens_mb] for name in MEMORY}
    each = seconds(large) / sizes[-1], seconds(small) / sizes[max(0, len(sizes) - 2)]
    _measure.report("round_data", ratios | {"seconds_per_pair/LARGE_vs_SMALL": [each[0] / each[1]]}, TARGETS)


def seconds(figures: dict[str, float]) -> float:
    return sum(figures[each] for each in STEPS)


def run(checkout: Path, pairs: int) -> dict[str, float]:
    env = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(pairs)]
    said = subprocess.run(command, env=env, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True, timeout=1200)
    figures: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return figures


class Memory:
    """The most private memory, in MB, that this process has while the block runs, above what it had at its start."""

    def __enter__(self) -> "Memory":
        self.most, self._over = 0.0, threading.Event()
        self._start = private_mb()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, private_mb() - self._start)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(10)


def private_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextlib.contextmanager
def timed(figures: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - started


def write_pairs(folder: str, first: int, parts: int, pairs: int) -> list[int]:
    """Parts `first` to `first + parts` of so many pairs; their rows."""
    import numpy as np
    import pyarrow as pa

    from sampo_ray.data.preferences import PAIRS
    from sampo_ray.run.parts import part_place
    from sampo_ray.run.storage import Place

    rows = []
    for index in range(first, first + parts):
        count = min(PART, pairs - index * PART)
        rng, sides = np.random.default_rng(index), []
        for tokens in TOKENS:
            ids = pa.array(rng.integers(0, 32000, count * tokens, dtype=np.int32))
            sides.append(pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * tokens), ids))
        names = [f"pair-{index * PART + row}" for row in range(count)]
        nothing = pa.nulls(count, pa.float64())
        part_place(Place(folder), index).write_table(pa.table([names, *sides, nothing, nothing], schema=PAIRS))
        rows.append(count)
    return rows


def one(pairs: int) -> dict[str, float]:
    """The figures of one size with the checkout that is imported."""
    os.environ.setdefault("RAY_DISABLE_METRICS_COLLECTION", "1")
    import numpy as np
    import ray

    from sampo_ray.loop import stages
    from sampo_ray.loop.blocks import StageOutput
    from sampo_ray.run.parts import parts_of
    from sampo_ray.run.storage import Place

    new = not hasattr(stages, "reorder")
    if new:
        from sampo_ray.loop.reorder import reorder
    else:
        reorder = stages.reorder
    ray.init(address="local", num_cpus=8, object_store_memory=3 << 30, include_dashboard=False, log_to_driver=False)
    figures: dict[str, float] = {}
    folder = tempfile.mkdtemp(prefix="round-data-")
    try:
        place, count = Place(folder), -(-pairs // PART)
        write = ray.remote(num_cpus=4)(write_pairs)
        made = [write.remote(f"{folder}/data", i, min(64, count - i), pairs) for i in range(0, count, 64)]
        data = parts_of(place.at("data"), [rows for part in ray.get(made, timeout=900) for rows in part])
        stages.lengths(data[:2])  # Ray starts its workers
        with Memory() as driver:
            with timed(figures, "reorder"):
                order = np.random.default_rng(0).permutation(pairs)
                parts = reorder(data, order, StageOutput(place.at("pairs")), PART)
            with timed(figures, "lengths"):
                lengths = stages.lengths(parts)
        figures["driver"] = driver.most
        own = {"env_vars": {"SAMPO_BENCH_ROLE": "rank"}}  # a process of its own, which has made no parts
        rank = ray.remote(num_cpus=1, runtime_env=own)(read_as_rank)
        if new:
            with Memory() as driver:
                figures |= epochs_now(rank, folder, parts, lengths)
            figures["driver"] = max(figures["driver"], driver.most)
        else:
            figures |= ray.get(rank.remote(parts, lengths), timeout=1800)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def epochs_now(rank: Any, folder: str, parts: Any, lengths: Any) -> dict[str, float]:
    """A rank beside a driver that makes later epochs, as in a run; the first epoch is told apart by a file."""
    import ray

    from sampo_ray.actors.ranks.exchange import RoundSpec
    from sampo_ray.config.run import load_config
    from sampo_ray.loop.epochs import LaterEpochs
    from sampo_ray.run.storage import Place
    from sampo_ray.training.batching import has_parts_of_its_own, steps_in_round

    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": folder, "seed": 0}}
    tree |= {"rounds": {"epochs": EPOCHS}, "optim": {"batch_size": BATCH}, "reference": {"where": "workers"}}
    steps, in_order = steps_in_round(len(lengths), BATCH, EPOCHS), has_parts_of_its_own(lengths, EPOCHS)
    config = load_config(tree)
    spec = RoundSpec("r", Place(folder), config, 0, 0, steps, tuple(parts), ray.put(lengths), in_order)
    with LaterEpochs(spec) as later:
        reading = rank.remote(spec, None)
        later.reached(1, 0)
        while not ray.wait([reading], timeout=1)[0]:
            later.check()
    found: dict[str, float] = ray.get(reading, timeout=60)
    return found


def read_as_rank(where: Any, lengths: Any) -> dict[str, float]:
    """Goes through all steps of one of WORLD ranks; memory beyond what the process has after its imports."""
    from sampo_ray.actors.ranks import rank as _  # noqa: F401  # what a rank imports
    from sampo_ray.config.rows import RowBudget
    from sampo_ray.training.batching import plan_round

    figures, budget = {}, RowBudget(BATCH, 2048, WORLD)
    order: dict[str, int] = {"epochs": EPOCHS, "seed": 0, "round": 0}
    tokens, epochs, started = 0, 0, time.perf_counter()
    with Memory() as memory:
        if lengths is None:
            import ray

            from sampo_ray.actors.ranks.round_data import StepPairs, read_ahead

            reader, lengths = StepPairs(where, 0), ray.get(where.lengths, timeout=60)
            plan = read_ahead(plan_round(lengths, budget, **order), reader.of)
        else:
            from sampo_ray.data.preferences import pairs_of

            pairs = [pair for part in where for pair in pairs_of(part.table())]
            plan = ((step, pairs) for step in plan_round(lengths, budget, **order))
        for step, pairs in plan:
            if step.epoch > epochs:
                figures["first epoch"] = time.perf_counter() - started
                started, epochs = time.perf_counter(), step.epoch
            tokens += sum(len(pairs[index].prompt) for row in step.rows[0] for index in row)
    figures["second epoch"] = time.perf_counter() - started
    assert tokens > 0
    return figures | {"rank": memory.most}


if __name__ == "__main__":
    main()
