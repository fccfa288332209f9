#!/usr/bin/env bash
# chat templates: `tool_calls: []` beside an answer makes DeepSeek V3's write no answer, and LFM 2.5's write a call
#
# Packages   trl 1.16.0 (only the templates that it ships: the models' own), transformers 5.19.0, jinja2 3.1.6.
#            Python 3.11 or 3.12.
# Input      A question and an answer. The answer's message has `"tool_calls": []`, as vLLM's chat endpoint writes it in every
#            message; or `"tool_calls": null`, as a table has it where another row of the column calls a function.
# Expected   The text of the same messages without the key.
# Happens    []: DeepSeek V3 writes the end of a list of calls in place of the answer. LFM 2.5 writes a list of no calls
#            behind it. Llama 3.1, Llama 3.2 and gpt-oss fail.
#            null: all five fail. Other templates write the same.
# Seen       deepseekv3  []: no answer             null: fails
#            lfm2_2_5    []: more than the answer  null: fails
#            llama3_1    []: fails                 null: fails
#            llama3_2    []: fails                 null: fails
#            gptoss      []: fails                 null: fails
#            qwen3       []: the same              null: the same
#            deepseekv3: '<s><｜User｜>How many steps?<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
#            lfm2_2_5: '... Two hundred and twelve.<|tool_call_start|>[]<|tool_call_end|><|im_end|>\n' (shortened)
# Matters    Answers that a vLLM server gave, or a Parquet file with some tool calls, become training data. With DeepSeek's
#            template a model is then trained to end its turn without a word, on every row, and nothing is said. Whoever
#            reads messages must take out keys that are null or empty before a template sees them.
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


def rendered(name, **others):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    template = (templates / f"{name}.jinja").read_text()
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER, **others}]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        return None


def kind(name, calls):
    plain, found = rendered(name), rendered(name, tool_calls=calls)
    if found is None:
        return "fails"
    return "the same" if found == plain else "more than the answer" if ANSWER in found else "no answer"


expected = {
    "deepseekv3": ("no answer", "fails"),
    "lfm2_2_5": ("more than the answer", "fails"),
    "llama3_1": ("fails", "fails"),
    "llama3_2": ("fails", "fails"),
    "gptoss": ("fails", "fails"),
    "qwen3": ("the same", "the same"),
}
found = {name: (kind(name, []), kind(name, None)) for name in expected}
for name, (empty, null) in found.items():
    print(f"{name:12}[]: {empty:22}null: {null}")
for name in ("deepseekv3", "lfm2_2_5"):
    print(f"{name}: {rendered(name, tool_calls=[])!r}")
sys.exit(0 if found == expected else 1)
PYTHON
