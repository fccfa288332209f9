"""What a family's tiny model is: its type, and what its configuration has besides the common sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

Fields = Mapping[str, Any]

SIZES: Fields = {
    "vocab_size": 352,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    # latent attention (DeepSeek) and its index
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
"""Set wherever a type's configuration has the field, under the name it has there."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A variant of a family. `fields` come on top of SIZES, `text` inside text_config; `without`: sizes left alone."""

    family: str
    model_type: str
    fields: Fields
    text: Fields | None = None
    without: tuple[str, ...] = ()

    def config(self) -> PretrainedConfig:
        """Its configuration."""
        kind = CONFIG_MAPPING[self.model_type]
        fields = {**_sizes(kind, self.without), **self.fields}
        if self.text is not None:
            fields["text_config"] = {**_sizes(kind.sub_configs["text_config"], self.without), **self.text}
        return kind(**fields)


def spec(family: str, model_type: str, *, without: tuple[str, ...] = (), **fields: Any) -> Spec:
    """A variant whose configuration is flat."""
    return Spec(family, model_type, fields, without=without)


def rope(kind: str = "default", theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    """rope_parameters."""
    return {"rope_type": kind, "rope_theta": theta, **settings}


def _sizes(kind: type[PretrainedConfig], without: tuple[str, ...]) -> dict[str, Any]:
    """The common sizes that this class of configurations has fields for."""
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(SIZES)
    names = {name: name if name in known else (kind.attribute_map or {}).get(name) for name in SIZES}
    sizes = {name: SIZES[size] for size, name in names.items() if name in known and size not in without}
    if "kv_lora_rank" in known:  # each head has keys of its own
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    padding = getattr(kind, "pad_token_id", None)
    return sizes | ({"pad_token_id": 0} if isinstance(padding, int) and padding >= SIZES["vocab_size"] else {})
