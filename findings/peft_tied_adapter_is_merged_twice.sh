#!/usr/bin/env bash
# peft: a LoRA adapter on a tied head, with `ensure_weight_tying=True`, is merged twice
#
# Packages   peft 0.21.2, transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A Llama whose head and input embeddings are one tensor; LoRA with `target_modules=["lm_head"]` and
#            `ensure_weight_tying=True`, which puts the same adapter on both.
# Expected   `merge_and_unload` gives a model with the logits of the adapted one: both layers use W + D, with D the
#            adapter's product. The weights stay tied, so W + D has to be written once.
# Happens    D is added once for the head and once for the embeddings, to the same tensor: W + 2 D. peft warns that tied
#            layers "can lead to complications". It does not say that the sum is wrong, and the option is there for tied
#            layers.
# Seen       (merged weight - W) / D: 2.0000
#            largest difference of logits, merged against adapted: 0.3518
# Matters    Small models are mostly tied, and preference training with adapters ends with a merge for serving. The merged
#            model is not the one whose loss and margins were measured. Keep adapters off a tied head, or untie first.
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

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
model = LlamaForCausalLM(config).eval()
weight = model.lm_head.weight.detach().clone()
lora = LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True)
adapted = get_peft_model(model, lora).eval()
head, embeddings = adapted.base_model.model.lm_head, adapted.base_model.model.model.embed_tokens
with torch.no_grad():
    head.lora_B["default"].weight.normal_(std=0.02)  # as after some training: a fresh adapter changes nothing
    product = head.get_delta_weight("default").clone()
    assert torch.equal(product, embeddings.get_delta_weight("default")), "the two adapters are not tied"
    tokens = torch.arange(8)[None]
    before = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    after = merged(tokens).logits
    change = merged.lm_head.weight - weight
times = (change * product).sum().item() / (product * product).sum().item()
print(f"(merged weight - W) / D: {times:.4f}")
print(f"largest difference of logits, merged against adapted: {(after - before).abs().max().item():.4f}")
still_tied = merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
sys.exit(0 if still_tied and torch.allclose(change, 2 * product, atol=1e-6) else 1)
PYTHON
