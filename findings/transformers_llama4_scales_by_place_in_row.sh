#!/usr/bin/env bash
# transformers: Llama 4 scales attention by a token's place in the row, whatever its position ids say
#
# Packages   transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A random Llama 4 text model with `attn_temperature_tuning`, its default, and a small `floor_scale`, so that
#            few tokens show what 8,192 do with the default. One text alone, and the same text as the second of a packed
#            row, with `position_ids` that start again at 0 there: transformers' own way to pack texts without padding.
# Expected   The same logits but for rounding, as without the tuning.
# Happens    Layers without rotary embeddings scale their queries by `torch.arange` over the row. The second text gets the
#            scales of the first one's continuation. Nothing is said.
# Seen       largest difference of logits, packed from alone, without tuning: below 1e-4
#            largest difference of logits, packed from alone, with tuning:    3.4e-03 (logits up to 2.2)
# Matters    Packed training learns other log-probs than those that the model gives at inference, the more the further
#            back in a row a text is.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.19.0
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64}
shape = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
torch.manual_seed(0)
model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **shape, **experts, floor_scale=8)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
first, second = torch.randint(64, (2, 1, 16))


@torch.no_grad()
def difference(tuned):
    for layer in model.model.layers:
        layer.self_attn.attn_temperature_tuning = tuned
    positions = torch.arange(16).repeat(2)[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[:, 16:]
    alone = model(second, use_cache=False).logits
    return (packed - alone).abs().max().item(), alone.abs().max().item()


(without, _), (tuned, largest) = difference(False), difference(True)
print(f"largest difference of logits, packed from alone, without tuning: {without:.1e}")
print(f"largest difference of logits, packed from alone, with tuning:    {tuned:.1e} (logits up to {largest:.1f})")
sys.exit(0 if without < 1e-4 and tuned > 1e-3 else 1)
PYTHON
