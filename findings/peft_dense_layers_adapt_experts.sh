#!/usr/bin/env bash
# peft: adapters asked for on the dense layer of a mixture of experts are put on the experts of the other layers
#
# Packages   peft 0.21.2, transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A Qwen3-MoE of three layers, the first of which is dense (`mlp_only_layers=[0]`); LoRA with the full names of
#            that layer's three linear layers as `target_modules`.
# Expected   Adapters on `model.layers.0.mlp.gate_proj`, `up_proj` and `down_proj`, which are plain `nn.Linear`.
# Happens    None of them gets one. The experts of layers 1 and 2 do, which nothing named. peft rewrites every target that
#            ends with `.gate_proj`, `.up_proj` or `.down_proj` into the fused parameters of experts, for all model types
#            that transformers converts as Qwen2-MoE (DeepSeek-V2 and V3, GLM-4.5, Ernie-4.5, Dots1, ...), and says nothing.
# Seen       asked for: model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj
#            adapted:   model.layers.1.mlp.experts, model.layers.2.mlp.experts
# Matters    Dense and shared-expert layers are where adapters of large mixtures are put to stay small. Names of ends
#            (`down_proj`) and `all-linear` are rewritten alike. The adapters given as `state_dict` names instead are put
#            where they are asked for.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.19.0 peft==0.21.2
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

from peft import LoraConfig, inject_adapter_in_model
from torch import empty
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 3}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0])
wanted = [f"model.layers.0.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")]


def adapted(targets, **settings):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), Qwen3MoeForCausalLM(config), **settings)
    names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return sorted({name.partition(".lora_A.")[0].removesuffix(".base_layer") for name in names})


found = adapted(wanted)
print("asked for:", ", ".join(wanted))
print("adapted:  ", ", ".join(found))
assert adapted([], state_dict={f"{name}.lora_A.weight": empty(0) for name in wanted}) == wanted, "by state_dict"
sys.exit(0 if found == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)] else 1)
PYTHON
