"""How much memory training takes, estimated from a model's shape: for plans, and to refuse models that cannot fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sampo_ray.errors import ConfigError
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.logprobs import Tile
from sampo_ray.training.lora import adapter_names
from sampo_ray.training.saving import FILE_BYTES

if TYPE_CHECKING:
    from sampo_ray.config.run import RunConfig
    from sampo_ray.config.sections import TrainerConfig


BUCKET = {"cpu": 2**24, "cuda": 2**26}
"""Elements of gradients that are reduced at a time: enough for the network of GPUs, few where memory is a host's."""
AT_ONCE = 10**9
"""Elements that ZeRO-3 keeps gathered at most, and those of a rank that it steps at a time: DeepSpeed's defaults."""
FETCHED = 5 * 10**7
"""Elements that ZeRO-3 gathers ahead at a time, from the third step on, when it knows their order: its default."""


@dataclass(frozen=True)
class Shape:
    """A model's number of parameters, all and trained, and of layers; widths of hidden states, MLP and vocabulary;
    elements of the largest trained weight, and of the largest file of what is published within a round."""

    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    largest: int
    file: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """`model` may be on the meta device."""
        config: PretrainedConfig = model.config.get_text_config()
        hidden = config.hidden_size
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
        if not isinstance(intermediate, int):  # one for each layer, in Gemma-3n
            intermediate = max(intermediate)
        parameters = sum(p.numel() for p in model.parameters())  # tied ones once
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        layers, vocabulary = config.num_hidden_layers, config.vocab_size
        largest = max(trained, default=0)
        file = sum(trained) if adapter_names(model) else max(FILE_BYTES // 2, largest)
        return cls(parameters, sum(trained), layers, hidden, intermediate, vocabulary, largest, file)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one data-parallel rank.

    Its device has `weights`, `gradients`, `optimizer` and `buffers` at all times. In a backward pass it also has
    `activations`, the weights that are `gathered`, the gradient of the `head`, and one after the other what weights are
    `fetched` through, what the head works with (`tiles`) and copies of what is `reduced`; in the optimizer's step,
    instead, a copy of gradients (`flattened`). In host memory are the states that are `offloaded` and the `copies` that
    are published and stored while it trains on.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    head: int
    tiles: int
    gathered: int
    fetched: int
    reduced: int
    flattened: int
    offloaded: int
    copies: int

    @property
    def states(self) -> int:
        """Bytes that do not depend on the rows."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes of the device at most."""
        backward = self.activations + self.head + self.gathered + max(self.fetched, self.tiles, self.reduced)
        return self.states + self.buffers + max(backward, self.flattened)

    @property
    def host(self) -> int:
        """Bytes of host memory beside what the process itself takes."""
        return self.offloaded + self.copies


def plan_memory(
    shape: Shape, trainer: TrainerConfig, tokens_per_row: int, device: str, resident: bool = False
) -> MemoryPlan:
    """Mixed-precision AdamW under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): bf16 weights, fp32
    gradients, masters and two moments, the last three (at stage 3 all) divided over the ranks. A `resident` reference
    is a second copy of the weights.

    `device`: cpu or cuda. The rest is as DeepSpeed 0.19.8 has it (`zero/stage_1_and_2.py`, `zero/stage3.py`). With
    offloading gradients are accumulated on the device at stage 2 and on the host at stage 3, and copied to a second
    place on the host, where the step reads them; at stage 2 the host has what is sent back as well (bf16).
    """
    world, sharded, kept = trainer.fewest, trainer.zero_stage == 3, trainer.offload == "none"
    each = -(-shape.trained // world)
    weights = 2 * (-(-shape.parameters // world) if sharded else shape.parameters)
    here = weights * (trainer.offload != "parameters")
    head, tiles = _head(shape, device)
    buffers, reduced = _reduction(shape, sharded, device)
    # One rank has its weights whole, and on CPUs where it computes with them.
    gathers = sharded and (world > 1 or (trainer.offload == "parameters" and device != "cpu"))
    staged = 2 * shape.largest * (not kept and not sharded)  # for one gradient, on the device and on the host
    offloaded = weights - here + (0 if kept else (20 if sharded else 18) * each) + staged
    # Under ZeRO-2 whole files of a version are copied by the rank that writes them.
    share = each if sharded else max(each, min(shape.trained, shape.file))
    return MemoryPlan(
        weights=here + 2 * shape.parameters * resident,
        gradients=4 * each * (kept or not sharded),
        optimizer=12 * each * kept,
        buffers=buffers + staged,
        activations=_activations(shape, trainer, tokens_per_row),
        head=head,
        tiles=tiles,
        gathered=2 * min(shape.parameters, AT_ONCE) * gathers,
        fetched=2 * min(shape.parameters, FETCHED) * (sharded and world > 1),
        reduced=reduced,
        flattened=4 * min(each, AT_ONCE) * (kept and sharded),
        offloaded=offloaded,
        copies=12 * each + 2 * share,  # a checkpoint's masters and moments, and the rank's share of a version
    )


def _activations(shape: Shape, trainer: TrainerConfig, tokens_per_row: int) -> int:
    """Bytes of those of Llama layers for one row. With gradient checkpointing they are the inputs of all layers and one
    whole layer, with the selective kind also attention and the MLP's first products.
    """
    inputs = 2 * shape.hidden * tokens_per_row
    layer = tokens_per_row * (2 * (10 * shape.hidden + 4 * shape.intermediate) + 4 * 4 * shape.hidden)
    if not (recomputing := trainer.gradient_checkpointing):
        return shape.layers * layer
    selected = 2 * (shape.hidden + 2 * shape.intermediate) * tokens_per_row
    return shape.layers * (inputs + selected * (recomputing == "selective")) + layer


def _head(shape: Shape, device: str) -> tuple[int, int]:
    """Bytes of the head's bf16 gradient, where it is trained, and of a tile of logits with the tile's part of the
    weight, twice in fp32."""
    tile = Tile.of(torch.device(device))
    entries, weight = min(tile.vocabulary, shape.vocabulary), shape.vocabulary * shape.hidden
    return 2 * weight * (shape.largest >= weight), 8 * entries * (tile.tokens + shape.hidden)


def _reduction(shape: Shape, sharded: bool, device: str) -> tuple[int, int]:
    """Bytes of the buckets, and of the copies that are made to reduce one or a larger gradient.

    ZeRO-3 fills an fp32 bucket, of which each rank's parts are put together in a copy. ZeRO-2 has bf16 ones, two where
    communication overlaps, and copies what is reduced, once more in fp32. So is a gradient that no bucket holds.
    """
    bucket = min(BUCKET[device], shape.trained) if device == "cpu" else BUCKET[device]  # what is not used is not there
    piece = max(min(bucket, shape.trained), shape.largest)
    if sharded:
        return 4 * bucket, 4 * piece
    return 2 * bucket * (1 if device == "cpu" else 2), 6 * piece


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
        fix += ", or trainer.offload=optimizer with trainer.zero_stage=3"
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
