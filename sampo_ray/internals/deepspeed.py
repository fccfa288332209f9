"""DeepSpeed's private interfaces, checked with DeepSpeed 0.19.8."""

import io
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from deepspeed import DeepSpeedEngine, ops
from deepspeed.checkpoint import ds_to_universal


def skip_shared_memory_extension() -> None:
    """Keeps DeepSpeed from compiling, for minutes, an extension that gloo does not use. Edits its table of ops."""
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def clear_moments(engine: DeepSpeedEngine) -> None:
    """Sets Adam's moments and step counts to zero, in place: ZeRO keeps views of them. Reaches the inner optimizer."""
    for state in engine.optimizer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            if name in state:
                state[name].zero_()


def load_checkpoint(engine: DeepSpeedEngine, folder: Path, tag: str, strict: bool, universal: bool = False) -> None:
    """Loads a checkpoint; `strict`: it holds all weights; `universal`: it is one that `write_universal` made. Resets
    `_config.load_universal_checkpoint`, as other checkpoints of the same engine are not universal.
    """
    engine._config.load_universal_checkpoint = universal
    engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
    engine._config.load_universal_checkpoint = False
    if universal:  # DeepSpeed leaves the count of steps on the host, and one tensor for all parameters
        for parameter, state in engine.optimizer.optimizer.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)


def write_universal(checkpoint: Path, out: Path) -> None:
    """Writes what all ranks saved in `checkpoint` as one that any number of ranks can load: masters and moments by
    parameter (DeepSpeed's universal format; Lian et al. 2024, arXiv 2406.18820), the same bits. Calls the command-line
    tool `ds_to_universal` in this process.
    """
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": str(out)}
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(Namespace(**folders, **settings, inject_missing_state=True))
