"""How much memory training takes, estimated from a model's shape: for plans, and to refuse models that cannot fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sampo_ray.errors import ConfigError
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.logprobs import Tile

if TYPE_CHECKING:
    from sampo_ray.config.run import RunConfig
    from sampo_ray.config.sections import TrainerConfig


@dataclass(frozen=True)
class Shape:
    """A model's number of parameters, all and trained, and of layers; widths of hidden states, MLP and vocabulary."""

    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """`model` may be on the meta device."""
        config: PretrainedConfig = model.config.get_text_config()
        hidden = config.hidden_size
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
        if not isinstance(intermediate, int):  # one for each layer, in Gemma-3n
            intermediate = max(intermediate)
        parameters = sum(p.numel() for p in model.parameters())  # tied ones once
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(parameters, trained, config.num_hidden_layers, hidden, intermediate, config.vocab_size)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one data-parallel rank, without what is offloaded.

    The first three are exact except for DeepSpeed's buckets, the last two are estimates.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def states(self) -> int:
        """Bytes that do not depend on the rows."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations + self.head


def plan_memory(
    shape: Shape, trainer: TrainerConfig, tokens_per_row: int, device: str, resident: bool = False
) -> MemoryPlan:
    """Mixed-precision AdamW under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): bf16 weights, fp32
    gradients, masters and two moments, the last three (at stage 3 all) divided over the ranks. A `resident` reference
    is a second copy of the weights.

    Activations are those of a Llama layer for one row. With gradient checkpointing they are the inputs of all layers
    and one whole layer, with the selective kind also attention and the MLP's first products. The head takes its bf16
    gradient and, twice in fp32, a tile of logits and the tile's part of the weight.
    """
    world = trainer.fewest
    each = -(-shape.trained // world)
    weights = 2 * (-(-shape.parameters // world) if trainer.zero_stage == 3 else shape.parameters)
    inputs = 2 * shape.hidden * tokens_per_row
    layer = tokens_per_row * (2 * (10 * shape.hidden + 4 * shape.intermediate) + 4 * 4 * shape.hidden)
    activations = shape.layers * layer
    if recomputing := trainer.gradient_checkpointing:
        selected = 2 * (shape.hidden + 2 * shape.intermediate) * tokens_per_row
        activations = shape.layers * (inputs + selected * (recomputing == "selective")) + layer
    tile = Tile.of(torch.device(device))
    entries = min(tile.vocabulary, shape.vocabulary)
    head = 2 * shape.vocabulary * shape.hidden + 8 * entries * (tile.tokens + shape.hidden)
    kept = trainer.offload == "none"
    weights = weights * (trainer.offload != "parameters") + 2 * shape.parameters * resident
    return MemoryPlan(weights, 4 * each * kept, 12 * each * kept, activations, head)


def check_memory(
    shape: Shape, trainer: TrainerConfig, tokens_per_row: int, device: str, available: int, resident: bool = False
) -> None:
    """ConfigError when the trainer's states alone are more than `available` bytes.

    `available` is for all ranks together on CPU, and for one rank on a GPU.
    """
    if device == "cpu":  # offloading moves nothing out of this memory
        trainer = trainer.model_copy(update={"offload": "none", "min_workers": None})
    plan = plan_memory(shape, trainer, tokens_per_row, device, resident)
    ranks = trainer.fewest if device == "cpu" else 1
    if ranks * plan.states <= available:
        return
    count = "min_workers" if trainer.min_workers else "workers"
    asked = f"trainer.{count}={trainer.fewest} and trainer.zero_stage={trainer.zero_stage}"
    where = "" if device == "cpu" else " on each GPU"
    need, have = (f"{size / 2**30:.1f} GiB" for size in (ranks * plan.states, available))
    fix = "a smaller model.path" if device == "cpu" else f"more trainer.{count}"
    if resident:
        fix += ", or model.lora, whose base is the reference"
    elif device != "cpu" and trainer.zero_stage == 2:
        fix += ", or trainer.zero_stage=3"
    if device != "cpu" and trainer.offload == "none":
        fix += ", or trainer.offload=optimizer"
    raise ConfigError(
        f"model.path: training its {shape.parameters / 1e9:.2f}B parameters with {asked} takes {need} for weights, "
        f"gradients and optimizer alone{where}, but there are only {have}; use {fix}"
    )


def check_device(model: PretrainedConfig, config: RunConfig) -> None:
    """`check_memory` for a model's configuration and this machine."""
    shape = Shape.of(on_meta(model, config.model.lora))
    resident = config.method.needs_distributions and config.model.lora is None
    check_memory(shape, config.trainer, config.row_budget.tokens_per_row, *device_memory(), resident)


def device_memory() -> tuple[str, int]:
    """Kind and bytes of this machine's first GPU, or of its main memory where it has none."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    import psutil

    return "cpu", psutil.virtual_memory().total
