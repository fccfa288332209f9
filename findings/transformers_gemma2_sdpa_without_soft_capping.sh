#!/usr/bin/env bash
# transformers: Gemma 2 as it is loaded by default computes attention without the soft-capping of its configuration
#
# Packages   transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A random Gemma 2 of two layers with `attn_logit_softcapping`, and `attn_implementation` not set.
# Expected   The scores of attention are capped as the configuration says, as `eager`, FlashAttention and vLLM cap them; or
#            an error or a warning where the chosen implementation cannot.
# Happens    The default is `sdpa`, whose function takes `softcap` among its further arguments and does nothing with it:
#            the log-probs are, but for rounding, those of the model without soft-capping. Nothing is said. VaultGemma's
#            attention has the same argument.
# Seen       chosen by transformers: sdpa
#            largest difference of log-probs, sdpa from eager:              5.5
#            largest difference of log-probs, sdpa from eager without caps: 3.3e-06
# Matters    A policy trained so is another model than the one that engines serve, and log-probs of the two differ.
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
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 1}
torch.manual_seed(0)
model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_logit_softcapping=2.0)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
chosen = model.config._attn_implementation


@torch.no_grad()
def log_probs(implementation, cap):
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = cap
    return model(torch.arange(12)[None]).logits.log_softmax(-1)


default = log_probs(chosen, 2.0)
from_eager, from_uncapped = ((default - log_probs("eager", cap)).abs().max().item() for cap in (2.0, None))
print("chosen by transformers:", chosen)
print(f"largest difference of log-probs, {chosen} from eager:              {from_eager:.1f}")
print(f"largest difference of log-probs, {chosen} from eager without caps: {from_uncapped:.1e}")
sys.exit(0 if from_eager > 0.1 and from_uncapped < 1e-4 else 1)
PYTHON
