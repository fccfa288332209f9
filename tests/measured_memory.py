"""What ranks take of this machine's memory: states, steps and copies of a small model, in one setting after another.

All is on CPUs, where what is offloaded counts too. `python -m tests.measured_memory 1 2` shows a table for one and two
ranks.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sampo_ray.config.run import RunConfig
from sampo_ray.training.batching import Pair

MODEL = {
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
MODELS = {"model": MODEL, "small": MODEL | {"num_hidden_layers": 1}}
"""29 million parameters in few tensors: their states are large beside all that is not planned, and a step takes a
second. The small one is trained first, for what libraries take once and keep."""
TOKENS, PAIRS, STEPS = 64, 1, 3
"""Tokens of a row, pairs of a rank and step (what is computed is not what is measured), and steps: ZeRO-3 knows the
order of weights, and gathers ahead, from the third on."""
M_MMAP_THRESHOLD, SMALL = -3, 1 << 17
PRELOADED = [
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch's compiler
    "peft",
    "sampo_ray.training.learner",
    "transformers.models.llama.modeling_llama",
]
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


def write_models(folder: Path) -> None:
    """Writes the models that `measured` trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    for name, model in MODELS.items():
        LlamaForCausalLM(LlamaConfig(**model)).to(torch.bfloat16).save_pretrained(folder / name)


def measured(models: Path, world: int, setting: Setting) -> Measured:
    """Of the rank that took most; each is a new process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)  # which takes seconds
    with tempfile.TemporaryDirectory() as scratch:
        mp.start_processes(_rank, (world, models, setting, Path(scratch)), world, start_method="forkserver")
        found = [Measured(**json.loads(Path(scratch, f"{rank}.json").read_text())) for rank in range(world)]
    return max(found, key=lambda each: each.peak)


def _rank(rank: int, world: int, models: Path, setting: Setting, scratch: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, SMALL)  # what is freed goes back to the system
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world)
    _train(_config(models / "small", world, setting), world, 1)
    gc.collect()
    libc.malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    config = _config(models / "model", world, setting)
    _train(config, world, STEPS)
    found = Measured(_planned(config), _resident("VmHWM") - before)
    (scratch / f"{rank}.json").write_text(json.dumps(asdict(found)))
    dist.barrier()
    dist.destroy_process_group()


def _config(model: Path, world: int, setting: Setting) -> RunConfig:
    stage, rank, offload = setting
    return RunConfig.model_validate(
        {
            "model": {"path": str(model), "lora": rank and {"rank": rank}},
            "data": {"train": "d", "max_length": TOKENS},
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


def _planned(config: RunConfig) -> int:
    from transformers import AutoConfig

    from sampo_ray.training.architecture import on_meta
    from sampo_ray.training.memory import Shape, plan_memory

    shape = Shape.of(on_meta(AutoConfig.from_pretrained(config.model.path), config.model.lora))
    plan = plan_memory(shape, config.trainer, TOKENS, "cpu")
    return plan.total + plan.host


def _train(config: RunConfig, world: int, steps: int) -> None:
    """A round, each step with a version and a checkpoint, whose copies stay, and what begins the next; as in a run."""
    from sampo_ray.config.rows import RowBudget
    from sampo_ray.training.batching import lengths_of, plan_round
    from sampo_ray.training.host_copies import HostBuffer
    from sampo_ray.training.learner import Learner, load_trained

    cpu = torch.device("cpu")
    learner = Learner(load_trained(config, Path(config.model.path), 0, cpu), config, cpu)
    learner.begin_round(0)
    version = learner.weights if learner.adapter_names is None else learner.adapters
    checkpoint, published = HostBuffer(), HostBuffer()
    version(published)
    learner.warm(checkpoint)
    pairs = learner.score(_pairs(steps * PAIRS * world))
    for step in plan_round(lengths_of(pairs), RowBudget(PAIRS * world, TOKENS, world), epochs=1, seed=0, round=0):
        learner.optimize(step, pairs, steps)
        version(published)
        learner.snapshot(checkpoint)
    learner.begin_round(1)
    learner.score(pairs[: PAIRS * world])
    learner._engine.destroy()


def _pairs(count: int) -> list[Pair]:
    """Pairs of random tokens, all as long: oneDNN compiles products for each length of rows, and keeps them."""
    rng = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return rng.integers(5, MODEL["vocab_size"], TOKENS // 3).astype(np.int32)

    return [Pair(f"pair-{index}", tokens(), tokens(), tokens()) for index in range(count)]


def _resident(field: str) -> int:
    """Bytes of this process, by the name of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main(worlds: list[int]) -> None:
    with tempfile.TemporaryDirectory() as models:
        write_models(Path(models))
        for world, setting in product(worlds, SETTINGS):
            found, (stage, rank, offload) = measured(Path(models), world, setting), setting
            what = f"{world} ranks, ZeRO-{stage}, {f'LoRA {rank}' if rank else 'full'}, offload {offload}"
            sizes = f"planned {found.planned / 1e6:6.0f} MB, measured {found.peak / 1e6:6.0f}"
            sys.stdout.write(f"{what:45} {sizes}, {found.ratio:.2f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
