"""DeepSpeed's private interfaces, checked with DeepSpeed 0.19.8."""

import copy
import io
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine, ops, zero
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn


def skip_shared_memory_extension() -> None:
    """Keeps DeepSpeed from compiling, for minutes, an extension that gloo does not use. Edits its table of ops."""
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _Partitioning(zero.Init):
    """`zero.Init` of a module that gives each parameter the share that is read for this rank, where that takes the
    whole parameter, has rank 0 send it to all, and keeps a part of it."""

    def __init__(
        self, module: nn.Module, settings: Mapping[str, object], share: Callable[[nn.Parameter], Tensor]
    ) -> None:
        self._share = share
        super().__init__(module=module, config_dict_or_path=settings, dtype=torch.bfloat16)
        del self._share  # each parameter keeps this object

    def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
        for parameter in param_list:
            if not is_zero_param(parameter):
                self._convert_to_deepspeed_param(parameter)
                self._take(parameter, self._share(parameter))

    def _take(self, parameter: Any, share: Tensor) -> None:
        size = self._aligned_size(parameter)
        count = size // self._partition_world_size(parameter)
        part: Any = torch.zeros(count, dtype=parameter.dtype, device=self.remote_device)
        if self.pin_memory:
            part = get_accelerator().pin_memory(part)
        part[: len(share)] = share
        part.ds_numel, part.status, part.final_location = count, PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor, parameter.ds_numel_aligned = part, size
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.local_device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def partition(module: nn.Module, settings: Mapping[str, object], share: Callable[[nn.Parameter], Tensor]) -> None:
    """Makes a module one of ZeRO-3 under DeepSpeed's `settings`, as `zero.Init` does, whose parameters need not be in
    memory: `share` gives this rank's elements of each, flat, without padding.

    Buffers go to the rank's device. Overrides two of `zero.Init`'s methods, and sets what it sets on parameters.
    """
    made = _Partitioning(module, settings, share)
    module.to(made.local_device)


def clear_moments(engine: DeepSpeedEngine) -> None:
    """Sets Adam's moments and step counts to zero, in place: ZeRO keeps views of them. Reaches the inner optimizer."""
    for state in engine.optimizer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            if name in state:
                state[name].zero_()


class _Collected(CheckpointEngine):
    """A checkpoint engine that writes nothing: `states` has, by file name, what it was to save, but the parameters."""

    def __init__(self, parameters: Collection[str]) -> None:
        super().__init__()
        self.states: dict[str, Any] = {}
        self._parameters = parameters

    def create(self, info: object) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        if "module" in state_dict:
            rest = {name: value for name, value in state_dict["module"].items() if name not in self._parameters}
            state_dict = state_dict | {"module": copy.deepcopy(rest)}  # buffers, to which a forward pass may write
        self.states[Path(path).name] = state_dict

    def load(self, path: str, map_location: object = None) -> Any:
        raise NotImplementedError

    def commit(self, info: object) -> bool:
        return True


def checkpoint_states(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What this rank has to write of a checkpoint, by file name; collective. The tensors are those in use: they change
    with the next optimizer step. DeepSpeed's engines that write beside the training leave that to their user, too.
    Nothing is written, no script of DeepSpeed's either: on a busy disk that takes seconds, for which all would wait.

    There are no weights beside the fp32 masters, of which those that are trained follow, and no frozen ones, which do
    not change: under ZeRO-2 the first rank alone would copy and write them, and all others wait for it."""
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    collected, writing = _Collected(parameters), engine.checkpoint_engine
    engine.checkpoint_engine, engine._copy_recovery_script = collected, lambda folder: None
    try:
        engine.save_checkpoint("nowhere", tag="state", save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = writing
        del engine._copy_recovery_script
    return collected.states


def missing_moments(engine: DeepSpeedEngine) -> int:
    """Bytes of the moments, and of the counts of steps, that this rank does not have yet: AdamW makes them in its
    first step."""
    optimizer = engine.optimizer
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
    masters = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
    return sum(2 * master.nbytes + 256 for master in masters if not optimizer.optimizer.state.get(master))


def checkpoint_files(engine: DeepSpeedEngine) -> list[str]:
    """Names of the files of a checkpoint by as many ranks that this rank loads."""
    return [Path(name("", "")).name for name in (engine._get_ckpt_name, engine._get_zero_ckpt_name)]


def load_checkpoint(engine: DeepSpeedEngine, folder: Path, tag: str, universal: bool = False) -> None:
    """Loads a checkpoint, with weights beside the masters or without; `universal`: it is one that `write_universal`
    made. Resets `_config.load_universal_checkpoint`, as other checkpoints of the same engine are not universal.
    """
    engine._config.load_universal_checkpoint = universal
    engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_module)
    engine._config.load_universal_checkpoint = False
    if not engine.zero_optimization_partition_weights():  # ZeRO-3 makes its weights of the masters itself
        engine.optimizer.update_lp_params()
    if universal:  # DeepSpeed leaves the count of steps on the host, and one tensor for all parameters
        for parameter, state in engine.optimizer.optimizer.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)


def _load_module(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Loads what there is of a module's state; RuntimeError for names that it does not have."""
    dst.load_state_dict({**dst.state_dict(), **src})


def write_universal(checkpoint: Path, out: Path) -> None:
    """Writes what all ranks saved in `checkpoint` as one that any number of ranks can load: masters and moments by
    parameter (DeepSpeed's universal format; Lian et al. 2024, arXiv 2406.18820), the same bits. Calls the command-line
    tool `ds_to_universal` in this process.
    """
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": str(out)}
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(Namespace(**folders, **settings, inject_missing_state=True))
