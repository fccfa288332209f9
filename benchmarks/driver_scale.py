"""What a rollout item costs the driver as the fleet grows: CPU seconds, and bytes that it gets or sends.

The replicas are simulated: they sleep as long as a short generation takes and return a COMPLETIONS block of the usual
shape. All the rest is the real thing: Serve's router, `stages.sample`, blocks in the object store and on disk.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _measure
import _rig
from _measure import Target

SAMPLES = 4
TOKENS = 128
PROMPT_TOKENS = 64
ONGOING = 16
GENERATION_S = 0.05
TARGETS = {"driver_cpu_64_vs_4": Target(at_most=1.1)}


class SimulatedReplica:
    """Has the handle method of a policy replica that rollouts call."""

    async def generate(self, prompts: Any, rows: Sequence[int], request: Any) -> Any:
        import pyarrow as pa

        await asyncio.sleep(GENERATION_S)
        samples = request.samples
        chosen, count = prompts.take(list(rows)), len(rows) * samples
        block = chosen.take([row for row in range(len(chosen)) for _ in range(samples)])
        columns = {
            "sample": pa.array(list(range(samples)) * len(chosen), pa.int32()),
            "completion": pa.array([list(range(TOKENS))] * count, pa.list_(pa.int32())),
            "text": pa.array(["word " * TOKENS] * count, pa.string()),
            "finish_reason": pa.array(["stop"] * count, pa.string()),
            "logprobs": pa.array([[-1.0] * TOKENS] * count, pa.list_(pa.float32())),
            "first_version": pa.array([0] * count, pa.int64()),
            "last_version": pa.array([0] * count, pa.int64()),
        }
        for name, column in columns.items():
            block = block.append_column(name, column)
        return block


@dataclass
class Run:
    """One stage of rollouts: calls (items), driver's CPU seconds and wall seconds, bytes through it and past it."""

    items: int
    cpu_s: float
    wall_s: float
    through: int
    past: int


def main() -> None:
    parser = _measure.options(__doc__.splitlines()[0], requests=16384, repeats=4)
    parser.add_argument("--most", type=int, default=64, help="replicas of the largest fleet; each is a process")
    args = parser.parse_args()
    _rig.quiet()
    import ray

    share = max(SAMPLES, args.requests // args.repeats)
    ray.init(address="local", num_cpus=16, object_store_memory=2 << 30, include_dashboard=False, log_to_driver=False)
    found: dict[int, list[Run]] = {}
    with _rig.scratch() as folder:
        for sizes in ((4, args.most), (1, 16)):
            sides = {str(size): partial(rollouts, folder, fleet(size), size, share) for size in sizes}
            for side in sides.values():
                side(99)  # the router learns its replicas, Ray starts its workers
            found |= {int(name): runs for name, runs in _measure.take_turns(sides, args.repeats).items()}
            for size in sizes:
                delete(size)
    rows = []
    for size, runs in sorted(found.items()):
        cpu = [1e3 * run.cpu_s / run.items for run in runs]
        rate = [run.items / run.wall_s for run in runs]
        through, past = (sum(getattr(run, name) for run in runs) for name in ("through", "past"))
        items = sum(run.items for run in runs)
        each = f"{through / items:.0f} B", f"{past / items:,.0f} B"
        rows.append((str(size), str(items), _measure.spread(cpu, 2), _measure.spread(rate), *each))
    columns = "replicas", "items", "driver CPU ms/item", "items/s", "through the driver/item", "of completions/item"
    _measure.show("driver_scale", columns, rows)
    ratios = [b.cpu_s / b.items / (a.cpu_s / a.items) for a, b in zip(found[4], found[args.most], strict=True)]
    _measure.report("driver_scale", {"driver_cpu_64_vs_4": ratios}, TARGETS)
    ray.shutdown()


def fleet(size: int) -> Any:
    from ray import serve

    _measure.note(f"starting {size} simulated replicas")
    deployment = serve.deployment(
        SimulatedReplica,
        num_replicas=size,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": 0.01},
    )
    return serve.run(deployment.bind(), name=f"simulated-{size}", route_prefix=None)


def delete(size: int) -> None:
    from ray import serve

    serve.delete(f"simulated-{size}")


def rollouts(folder: Path, handle: Any, size: int, samples: int, turn: int) -> Run:
    import pyarrow as pa

    from sampo_ray.config.sections import RolloutConfig
    from sampo_ray.loop import stages
    from sampo_ray.loop.blocks import StageOutput
    from sampo_ray.run.parts import Part, part_place
    from sampo_ray.run.storage import Place

    stage, parts = Place(str(folder / f"{size}-{turn}")), []
    for number, first in enumerate(range(0, samples // SAMPLES, stages.PART_PROMPTS)):
        count = min(stages.PART_PROMPTS, samples // SAMPLES - first)
        ids = pa.array([list(range(PROMPT_TOKENS))] * count, pa.list_(pa.int32()))
        names = [f"prompt-{first + row}" for row in range(count)]
        table = pa.table({"id": names, "messages": ["[]"] * count, "columns": ["{}"] * count, "prompt": ids})
        place = part_place(stage.at("prompts"), number)
        place.write_table(table)
        parts.append(Part(place, count))
    rollout = RolloutConfig(samples=SAMPLES, max_tokens=TOKENS)
    counted = Counted(handle)
    with counted.gets():
        cpu, wall = time.process_time(), time.perf_counter()
        made = stages.sample(
            lambda version: counted, parts, StageOutput(stage.at("out")), rollout, 0, ("run", 0), size * ONGOING
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    past = sum(part.table().nbytes for part in made)
    return Run(counted.calls, cpu, wall, counted.nbytes, past)


class Counted:
    """A handle that counts its calls, the bytes of their arguments, and those of all that the driver gets from Ray."""

    def __init__(self, handle: Any) -> None:
        self._handle, self.calls, self.nbytes = handle, 0, 0
        self.generate = self

    def remote(self, block: Any, *arguments: Any) -> Any:
        self.calls += 1
        self.nbytes += len(json.dumps(arguments, default=lambda x: list(x) if isinstance(x, range) else vars(x)))
        return self._handle.generate.remote(block, *arguments)

    @contextmanager
    def gets(self) -> Any:
        import ray
        from ray import cloudpickle

        get = ray.get

        def counting(*args: Any, **kwargs: Any) -> Any:
            value = get(*args, **kwargs)
            self.nbytes += len(cloudpickle.dumps(value))
            return value

        ray.get = counting
        try:
            yield
        finally:
            ray.get = get


if __name__ == "__main__":
    main()
