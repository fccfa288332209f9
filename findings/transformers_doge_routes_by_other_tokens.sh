#!/usr/bin/env bash
# transformers: a Doge with experts routes each token by the scores of other tokens, later ones included
#
# Packages   transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A random Doge of two layers with `is_moe`; twelve tokens, and the same with another last one.
# Expected   The logits of the tokens before the last do not change, as without `is_moe`: the model is causal.
# Happens    They change. The router's scores [tokens, 2 x keys] are viewed as [2, tokens, keys], which does not split each
#            token's scores in two: a token gets those of two others, the later the further back in the batch they are.
# Seen       largest change of earlier logits, without experts: 0.0e+00
#            largest change of earlier logits, with experts:    4.1e-02
# Matters    Log-probs of a text depend on what follows it and on what else is in its batch. What is trained is not what a
#            model gives as it writes, one token after the other.
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
from transformers import DogeConfig, DogeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
first = torch.arange(1, 13)[None]
second = first.clone()
second[0, -1] = 40


@torch.no_grad()
def change(experts):
    torch.manual_seed(0)
    config = DogeConfig(**sizes, **heads, is_moe=experts, num_experts=16, num_experts_per_tok=2)
    model = DogeForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    logits, other = (model(ids, use_cache=False).logits[0, :-1] for ids in (first, second))
    return (logits - other).abs().max().item()


without, with_experts = change(False), change(True)
print(f"largest change of earlier logits, without experts: {without:.1e}")
print(f"largest change of earlier logits, with experts:    {with_experts:.1e}")
sys.exit(0 if without == 0 and with_experts > 1e-3 else 1)
PYTHON
