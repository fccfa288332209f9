#!/usr/bin/env bash
# chat templates: a message whose content is a list of one text part is trained empty, or as a Python list
#
# Packages   trl 1.16.0 (only the templates that it ships: the models' own), transformers 5.19.0, jinja2 3.1.6.
#            Python 3.11 or 3.12.
# Input      A question and an answer. Their content once as text, once as [{"type": "text", "text": ...}]. OpenAI's chat
#            format, `apply_chat_template` and TRL's conversational form allow that, and some preference data has it
#            throughout (lmarena-ai/arena-human-preference-140k).
# Expected   The same text, or an error.
# Happens    Qwen 3: both turns are empty. Llama 3, Gemma, Command R7B, Nemotron 3: the list as Python prints it. LFM 2: the
#            list as JSON. There is no warning. Others fail (Qwen 2.5, Phi 3, DeepSeek), or write the same.
# Seen       qwen3                 empty
#            qwen3_instruct_2507   empty
#            llama3                Python list
#            llama3_2              Python list
#            gemma                 Python list
#            cohere2               Python list
#            nemotron_3_nano       Python list
#            lfm2                  JSON
#            qwen2_5               fails
#            gemma3                the same
#            qwen3: '<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n'
# Matters    TRL's DPO hands such turns on as they are: with Qwen 3, prompt, chosen and rejected are empty in every pair.
#            Whether it does depends on the model alone: what is right for one family is empty for the next one.
#            Whoever reads conversations must join text parts before a template sees them, or refuse them.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.19.0 jinja2==3.1.6
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install --no-deps trl==1.16.0
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.util
import pathlib
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

[package] = importlib.util.find_spec("trl").submodule_search_locations  # found, not imported: it would ask for torch
templates = pathlib.Path(package, "chat_templates")
QUESTION, ANSWER = "How many steps?", "Two hundred and twelve."
text = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
parts = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in text]


def rendered(template, messages):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        return None


def kind(name):
    template = (templates / f"{name}.jinja").read_text()
    expected, found = rendered(template, text), rendered(template, parts)
    if found is None:
        return "fails"
    if found == expected:
        return "the same"
    if QUESTION not in found and ANSWER not in found:
        return "empty"
    return "Python list" if f"[{{'type': 'text', 'text': '{ANSWER}'}}]" in found else "JSON"


expected = {
    "qwen3": "empty",
    "qwen3_instruct_2507": "empty",
    "llama3": "Python list",
    "llama3_2": "Python list",
    "gemma": "Python list",
    "cohere2": "Python list",
    "nemotron_3_nano": "Python list",
    "lfm2": "JSON",
    "qwen2_5": "fails",
    "gemma3": "the same",
}
found = {name: kind(name) for name in expected}
for name, what in found.items():
    print(f"{name:22}{what}")
print(f"qwen3: {rendered((templates / 'qwen3.jinja').read_text(), parts)!r}")
sys.exit(0 if found == expected else 1)
PYTHON
