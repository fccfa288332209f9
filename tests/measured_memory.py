"""What ranks take of this machine's memory: states, steps and copies of a small model, one setting after another.

All is on CPUs, where what is offloaded counts too. `python -m tests.measured_memory 1 2` shows a table for one and two
ranks.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sampo_ray.config.run import RunConfig

MODEL = {
    "vocab_size": 8_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""31 million parameters: their states are large beside all that is not planned, and steps take a second."""
TOKENS, PAIRS = 128, 1
"""Tokens of a row, and pairs of a rank and step: what is computed is not what is measured."""
M_MMAP_THRESHOLD, SMALL = -3, 1 << 20
Setting = tuple[int, int | None, str]
"""ZeRO's stage, rank of adapters, what is offloaded."""
SETTINGS: list[Setting] = [
    (stage, rank, offload)
    for stage, rank, offload in product((2, 3), (None, 64), ("none", "optimizer", "parameters"))
    if stage == 3 or offload != "parameters"
]


@dataclass(frozen=True)
class Measured:
    """Bytes that a rank took at most, and that were planned for it."""

    planned: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.planned / self.peak


def measured(world: int, settings: list[Setting] = SETTINGS) -> dict[Setting, Measured]:
    """By setting, of the rank that took most."""
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch, "model"))
        mp.spawn(_rank, (world, scratch, settings), nprocs=world)
        files = [json.loads(Path(scratch, f"{rank}.json").read_text()) for rank in range(world)]
    found = [[Measured(**each) for each in file] for file in files]
    most = [max(ranks, key=lambda each: each.peak) for ranks in zip(*found, strict=True)]
    return dict(zip(settings, most, strict=True))


def write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).save_pretrained(folder)


def _rank(rank: int, world: int, scratch: str, settings: list[Setting]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, SMALL)  # what is freed goes back to the system
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world)
    _peak(world, scratch, (2, 4, "none"))  # imports, and what libraries keep from their first use on
    found = [asdict(_peak(world, scratch, setting)) for setting in settings]
    Path(scratch, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _peak(world: int, scratch: str, setting: Setting) -> Measured:
    from transformers import AutoConfig

    from sampo_ray.training.architecture import on_meta
    from sampo_ray.training.memory import Shape, plan_memory

    stage, rank, offload = setting
    config = RunConfig.model_validate(
        {
            "model": {"path": f"{scratch}/model", "lora": rank and {"rank": rank}},
            "data": {"train": "d", "max_length": 128},
            "method": {"loss": "sigmoid"},
            "optim": {"batch_size": PAIRS * world},
            "trainer": {
                "workers": world,
                "zero_stage": stage,
                "offload": offload,
                "gradient_checkpointing": "selective" if offload == "parameters" else True,
            },
            "run": {"dir": "r"},
        }
    )
    shape = Shape.of(on_meta(AutoConfig.from_pretrained(config.model.path), config.model.lora))
    plan = plan_memory(shape, config.trainer, TOKENS, "cpu")
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    _train(config, world)
    return Measured(plan.total + plan.host, _resident("VmHWM") - before)


def _train(config: RunConfig, world: int) -> None:
    """Two steps, each with a version and a checkpoint, whose copies stay, as a rank of a run does."""
    from sampo_ray.config.rows import RowBudget
    from sampo_ray.training.batching import lengths_of, plan_round
    from sampo_ray.training.host_copies import HostBuffer
    from sampo_ray.training.learner import Learner, load_trained

    from .conftest import random_pairs

    cpu = torch.device("cpu")
    learner = Learner(load_trained(config, Path(config.model.path), 0, cpu), config, cpu)
    learner.begin_round(0)
    version = learner.weights if learner.adapter_names is None else learner.adapters
    checkpoint, published = HostBuffer(), HostBuffer()
    version(published)
    learner.warm(checkpoint)
    pairs = learner.score(random_pairs(2 * PAIRS * world, longest=40, vocabulary=MODEL["vocab_size"]))
    for step in plan_round(lengths_of(pairs), RowBudget(PAIRS * world, TOKENS, world), epochs=1, seed=0, round=0):
        learner.optimize(step, pairs, 2)
        version(published)
        learner.snapshot(checkpoint)
    learner._engine.destroy()


def _resident(field: str) -> int:
    """Bytes of this process, by the name of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    for ranks in map(int, sys.argv[1:]):
        for (stage, rank, offload), found in measured(ranks).items():
            what = f"{ranks} ranks, ZeRO-{stage}, {f'LoRA {rank}' if rank else 'full'}, offload {offload}"
            sizes = f"planned {found.planned / 1e6:6.0f} MB, measured {found.peak / 1e6:6.0f}"
            sys.stdout.write(f"{what:45} {sizes}, {found.ratio:.2f}\n")
