#!/usr/bin/env bash
# huggingface_hub: a card with results of two models, read and saved, gives the first one's results to the second
#
# Packages   huggingface_hub 2.4.0. Python 3.11 or 3.12.
# Input      A model card whose `model-index` (a list, by its specification) names two models, each with its result for the
#            same data set. It is loaded with `ModelCard.load`, a tag is added, and it is saved.
# Expected   The same metadata with the tag, or an error: invalid metadata is one.
# Happens    All results are in one entry with the name of the last model. Where they are of one task and data set they become
#            two metrics of one result, and nothing says which is whose. Nothing is logged. A `model_name` beside
#            `model-index` is removed.
# Seen       written:         {'small': [31.0], 'large': [78.0]}, model_name: Two Sizes
#            read and saved:  {'large': [31.0, 78.0]}, model_name: None
# Matters    Folders of a base and its tuned versions, or of several sizes, list their scores in one card. Tools that add a tag
#            or a licence with `ModelCard` then publish the scores of one model under another's name. `metadata_load` returns
#            the list as it is in the file.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install huggingface_hub==2.4.0
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

from huggingface_hub import ModelCard, metadata_load

CARD = """---
model_name: Two Sizes
model-index:
- name: small
  results:
  - task: {type: text-generation}
    dataset: {type: openai/gsm8k, name: GSM8K}
    metrics: [{type: exact_match, value: 31.0}]
- name: large
  results:
  - task: {type: text-generation}
    dataset: {type: openai/gsm8k, name: GSM8K}
    metrics: [{type: exact_match, value: 78.0}]
---
# Two sizes
"""


def told():
    """What the file's metadata say: scores by model, and the name beside them."""
    data = metadata_load("README.md")
    scores = {
        entry["name"]: [metric["value"] for result in entry["results"] for metric in result["metrics"]]
        for entry in data["model-index"]
    }
    return scores, data.get("model_name")


Path("README.md").write_text(CARD)
before = told()
card = ModelCard.load("README.md")
card.data.tags = ["math"]
card.save("README.md")
after = told()
for what, (scores, name) in (("written", before), ("read and saved", after)):
    print(f"{what + ':':<16} {scores}, model_name: {name}")
sys.exit(0 if before[0] == {"small": [31.0], "large": [78.0]} and after == ({"large": [31.0, 78.0]}, None) else 1)
PYTHON
