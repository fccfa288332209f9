#!/usr/bin/env bash
# transformers: with packed rows, `use_cache` changes the log-probs
#
# Packages   transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      Two sequences in one row, `position_ids` that start again at the second, no attention mask: the layout
#            that transformers documents for training without padding.
# Expected   `use_cache` decides whether keys and values are returned. It has no effect on the logits.
# Happens    Rows are cut where positions start again only if there is no cache. The default is `use_cache=True`; then the
#            second sequence attends to the first. There is no warning. A model in training mode does the same, until
#            gradient checkpointing turns the cache off.
# Seen       log-prob of the second sequence
#              alone                               -10.2893
#              packed, defaults                    -10.3576   cut: no
#              packed, use_cache=False             -10.2893   cut: yes
#              packed, training                    -10.3576   cut: no
#              packed, training, checkpointing     -10.2893   cut: yes
# Matters    A preference loss subtracts log-probs of the reference from those of the policy. If the policy trains with
#            gradient checkpointing and the reference is evaluated with defaults on the same rows, the two see other
#            contexts. Log-ratios are then not 0 for equal weights. Pass `use_cache=False` to both. A row in which two
#            answers share a prompt (positions start again after the first answer) needs a mask of its own: without a
#            cache, the cut takes the prompt from the second answer.
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
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()
first, second = [1, 2, 3], [4, 5, 6, 7]
row = torch.tensor([first + second])
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])


@torch.no_grad()
def logprob(ids, **options):
    """Sum over the tokens of the second sequence but its first."""
    logprobs = model(ids, **options).logits.log_softmax(-1)[0, -len(second) : -1]
    return logprobs.gather(-1, torch.tensor(second[1:])[:, None]).sum().item()


alone = logprob(torch.tensor([second]))
seen = {
    "packed, defaults": logprob(row, position_ids=positions),
    "packed, use_cache=False": logprob(row, position_ids=positions, use_cache=False),
}
model.train()  # a Llama has no dropout
seen["packed, training"] = logprob(row, position_ids=positions)
model.gradient_checkpointing_enable()
seen["packed, training, checkpointing"] = logprob(row, position_ids=positions)

print("log-prob of the second sequence")
print(f"  {'alone':34}{alone:10.4f}")
for name, value in seen.items():
    print(f"  {name:34}{value:10.4f}   cut: {'yes' if abs(value - alone) < 1e-5 else 'no'}")
cut = [abs(value - alone) < 1e-5 for value in seen.values()]
sys.exit(0 if cut == [False, True, False, True] else 1)
PYTHON
