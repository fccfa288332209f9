"""LoRA adapters that users bring: what peft saved, made into plain matrices that an engine computes as peft does.

vLLM reads rank and scaling of a whole adapter from peft's configuration and takes no notice of most other fields. So an
adapter is kept with its scaling in B and one rank for all layers (short ones filled with zeros), which leaves nothing
to read. A field that says anything else of how the adapter is computed is refused, also one that this program does not
know.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoConfig

from sampo_ray.errors import ConfigError
from sampo_ray.internals.transformers import checkpoint_name
from sampo_ray.run.buckets import checksum
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.storage import Place, absolute
from sampo_ray.training.architecture import on_meta
from sampo_ray.training.lora import MATRICES, adaptable_layers, file_name

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
MAX_RANK = 512
"""The largest that vLLM takes."""
MERGE = "merge it into its model (peft's merge_and_unload) and serve that as a model"

UNCHANGING = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying"),
        # Which layers have adapters is read from the weights.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # Only together with another field, which is looked at.
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""peft's fields (0.21) that do not change what given matrices compute."""
READ = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"})
UNSET: tuple[object, ...] = (None, False, "", [], {})
PLAIN_INITS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin that leave the model's own weights as they are."""


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as engines get it: `weights`, a safetensors file of A [rank, in] and B [out, rank] of each layer, by
    peft's names, with a scaling of 1.
    """

    rank: int
    layers: tuple[str, ...]
    weights: bytes

    @property
    def content(self) -> str:
        """32 hexadecimal digits that tell it from others; also the name of its folder."""
        return checksum(self.weights).rpartition(":")[2]

    def write(self, run: Place) -> None:
        """Puts it into a run directory, unless it is there."""
        place = run.at("adapters", self.content)
        if place.at(WEIGHTS).exists() and place.at(SETTINGS).exists():
            return
        scaling = {"r": self.rank, "lora_alpha": self.rank}
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **scaling}
        with place.draft() as draft:
            (draft / WEIGHTS).write_bytes(self.weights)
            (draft / SETTINGS).write_text(json.dumps({**settings, "target_modules": list(self.layers)}, indent=1))
            place.take(draft)


@dataclass(frozen=True)
class Layer:
    """A layer that may have an adapter: its name in the checkpoint, which engines know, and its shape [out, in]."""

    saved: str
    shape: tuple[int, int]


def read_adapter(folder: str, base: str) -> PlainAdapter:
    """An adapter that peft saved for the model in the folder `base`. ConfigError, which names the field or the weight,
    for one that would not be served as peft computes it.
    """
    place = Place(absolute(folder))
    for file in (WEIGHTS, SETTINGS):
        if not place.at(file).exists():
            raise ConfigError(f"{folder!r} holds no adapter of peft ({file} is missing); save one with save_pretrained")
    try:
        settings, tensors = json.loads(place.at(SETTINGS).read()), load(place.at(WEIGHTS).read())
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder!r} holds a damaged adapter ({error}); save it again") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder!r} holds a damaged adapter ({SETTINGS} is no mapping); save it again")
    try:
        check_settings(settings)
        layers = _layers(base)
        return plain(settings, _pairs(tensors, layers), layers)
    except ConfigError as error:
        raise ConfigError(f"{folder!r}: {error}") from None


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError for fields of an adapter_config.json that matrices alone do not do justice to."""
    if settings.get("peft_type") != "LORA" or settings.get("task_type") not in (None, "CAUSAL_LM"):
        kind = f"peft_type={settings.get('peft_type')!r}, task_type={settings.get('task_type')!r}"
        raise ConfigError(f"{kind}: only LoRA adapters of language models can be served; {MERGE}")
    if (start := settings.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise ConfigError(
            f"init_lora_weights={start!r} changed the model's own weights: save the adapter again with "
            f"path_initial_model_for_weight_conversion, or {MERGE}"
        )
    known = READ | UNCHANGING
    odd = {field: value for field, value in settings.items() if field not in known and value not in UNSET}
    if settings.get("bias", "none") != "none":
        odd["bias"] = settings["bias"]
    for field, value in odd.items():
        raise ConfigError(f"{field}={str(value)[:80]} cannot be served as an adapter; {MERGE}")


def plain(
    settings: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]], layers: Mapping[str, Layer]
) -> PlainAdapter:
    """The adapter of these layers' A and B."""
    rank = max(a.shape[0] for a, _ in pairs.values())
    if rank > MAX_RANK:
        raise ConfigError(f"rank {rank}: adapters of rank 1 to {MAX_RANK} can be served; {MERGE}")
    weights = dict[str, Tensor]()
    for layer, (a, b) in pairs.items():
        scaled = (b.float() * _scaling(settings, layer, a.shape[0])).to(b.dtype)
        if not (a.isfinite().all() and scaled.isfinite().all()):
            raise ConfigError(f"{layer}: its weights are not all finite numbers; train the adapter again")
        missing = rank - a.shape[0]
        padded = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(scaled, (0, missing))
        saved = layers[layer].saved
        weights |= {file_name(saved, side): part.contiguous() for side, part in zip(MATRICES, padded, strict=True)}
    return PlainAdapter(
        rank, tuple(sorted(layers[layer].saved for layer in pairs)), save(weights, metadata={"format": "pt"})
    )


def _scaling(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What peft multiplies B A of a layer by."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    said = ranks.get(get_pattern_key(list(ranks), layer), settings.get("r"))
    if said != rank:
        raise ConfigError(f"{layer} has rank {rank}, and r and rank_pattern say {said!r}; save the adapter again")
    alpha = alphas.get(get_pattern_key(list(alphas), layer), settings.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ConfigError(f"{layer}: lora_alpha and alpha_pattern say {alpha!r}, not a number; save the adapter again")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pairs(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer; `layers` are those that may have adapters. ConfigError for tensors that are neither, or of
    another model."""
    expected = {file_name(layer, side): (layer, side) for layer in layers for side in MATRICES}
    found = dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        if name not in expected:
            raise ConfigError(
                f"{name} is no A or B of a linear layer between embeddings and head (routers aside) of the version "
                f"that it is for; {MERGE} or, if it was trained on another version, set --base"
            )
        layer, side = expected[name]
        found.setdefault(layer, {})[side] = tensor
    return dict(_complete(found, layers))


def _complete(
    found: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, Layer]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    if not found:
        raise ConfigError(f"{WEIGHTS} holds no weights; save the adapter again")
    for layer, sides in found.items():
        if sides.keys() != set(MATRICES):
            raise ConfigError(f"{layer} has an A or a B alone; save the adapter again")
        a, b = (sides[side] for side in MATRICES)
        wanted, has = layers[layer].shape, (b.shape[0], a.shape[-1])
        if a.ndim != 2 or b.ndim != 2 or wanted != has or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ConfigError(
                f"{layer}: A {list(a.shape)} and B {list(b.shape)} do not fit the layer {list(wanted)} of the version "
                "that it is for; set --base to the version that the adapter was trained on"
            )
        yield layer, (a, b)


def _layers(base: str) -> dict[str, Layer]:
    """The layers of a model that may have adapters, by their names in memory, which peft saves, and in a checkpoint."""
    with scratch_folder() as folder:
        (folder / "config.json").write_bytes(Place(base).at("config.json").read())
        model = on_meta(AutoConfig.from_pretrained(folder))
    found = dict[str, Layer]()
    for name, linear in adaptable_layers(model).items():
        saved = checkpoint_name(model, f"{name}.weight")
        if saved is not None and type(linear) is nn.Linear:
            layer = Layer(saved.removesuffix(".weight"), (linear.out_features, linear.in_features))
            found |= {name: layer, layer.saved: layer}
    return found
