"""How much memory each rank takes while a model is loaded for ZeRO-3, and how long that takes.

Each rank is a process with gloo. `shares`: as a training rank loads (`load_trained`); `whole`: each rank loads all of
the model, which DeepSpeed then partitions. Memory is the peak of the resident set beyond that after all imports, in
parts of the rank's share of the model and two of its largest layers. All ranks share this machine's cores and disk, so
that with more ranks than cores wall time grows with what each does whatever its share; CPU time is that of one rank.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import _measure
import _rig
import _training
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RUNS = (("whole", 2), ("shares", 2), ("shares", 4), ("shares", 8))


def main() -> None:
    parser = _measure.options(__doc__ or "", requests=0, repeats=1)
    parser.add_argument("--layers", type=int, default=16, help="layers of the model of Llama-3.2-1B's shape")
    args = parser.parse_args()
    _rig.quiet()
    with _rig.scratch() as scratch:
        folder = Path(scratch) / "model"
        size, largest = write_model(folder, args.layers)
        ratios: dict[str, list[float]] = {}
        wall: dict[int, list[float]] = {}
        cpu: dict[int, list[float]] = {}
        for turn in range(args.repeats):
            for side, ranks in RUNS:
                out = Path(scratch) / f"{side}-{ranks}-{turn}"
                out.mkdir()
                mp.spawn(rank_loads, (ranks, side, str(folder), str(out)), nprocs=ranks)
                found = [[float(x) for x in file.read_text().split()] for file in out.glob("rank*")]
                peak, longest, busiest = (max(column) for column in zip(*found, strict=True))
                bound = size / ranks + 2 * largest
                print(
                    f"{side:8} {ranks} ranks: peak {peak / 1e6:6.0f} MB a rank of {bound / 1e6:.0f}, "
                    f"{longest:5.2f} s, {busiest:5.2f} s of CPU a rank",
                    flush=True,
                )
                if side == "shares":
                    ratios.setdefault(f"load_memory/{ranks}_ranks", []).append(peak / bound)
                    wall.setdefault(ranks, []).append(longest)
                    cpu.setdefault(ranks, []).append(busiest)
    targets = {name: _measure.Target(at_most=1) for name in ratios}
    for name, seconds in (("load_seconds", wall), ("load_cpu_seconds", cpu)):
        ratios[f"{name}/8_vs_2_ranks"] = [many / few for many, few in zip(seconds[8], seconds[2], strict=True)]
        targets[f"{name}/8_vs_2_ranks"] = _measure.Target(at_most=1.2)
    _measure.report("loading", ratios, targets)


def write_model(folder: Path, layers: int) -> tuple[int, int]:
    """A random bf16 model; its bytes, and those of its largest layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_training.LLAMA_1B | {"num_hidden_layers": layers})).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    layer = sum(each.nbytes for each in model.model.layers[0].parameters())
    return sum(each.nbytes for each in model.parameters()), max(layer, model.lm_head.weight.nbytes)


def rank_loads(rank: int, ranks: int, side: str, folder: str, out: str) -> None:
    import deepspeed

    from sampo_ray.config.run import RunConfig
    from sampo_ray.internals.deepspeed import skip_shared_memory_extension
    from sampo_ray.training.learner import deepspeed_config, load_trained
    from sampo_ray.training.policy import load_policy

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    skip_shared_memory_extension()
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=ranks)
    settings = {"zero_stage": 3, "workers": ranks}
    data = {"train": "pairs.jsonl"}
    config = RunConfig.model_validate(
        {"model": {"path": folder}, "data": data, "trainer": settings, "run": {"dir": "r"}}
    )
    cpu = torch.device("cpu")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start, busy = resident("VmRSS"), time.monotonic(), time.process_time()
    if side == "shares":
        policy = load_trained(config, Path(folder), 0, cpu)
    else:
        policy = load_policy(folder, config.trainer.gradient_checkpointing)
        deepspeed.zero.Init(module=policy, config_dict_or_path=deepspeed_config(config, cpu), dtype=torch.bfloat16)
    took, busy = time.monotonic() - start, time.process_time() - busy
    peak = resident("VmHWM") - before
    assert all(parameter.ds_tensor is not None for parameter in policy.parameters())
    Path(out, f"rank{rank}").write_text(f"{peak} {took} {busy}")
    dist.barrier()
    dist.destroy_process_group()


def resident(field: str) -> int:
    """Bytes of this process, by the name of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
