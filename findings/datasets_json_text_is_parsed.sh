#!/usr/bin/env bash
# datasets: text in JSON Lines does not always stay text
#
# Packages   datasets 5.2.0, pyarrow 26.0.1. Python 3.11 or 3.12.
# Input      Valid JSON Lines with preference pairs, read with `load_dataset("json", data_files=...)`.
# Expected   A JSON string is read as that string.
# Happens    1. Content is text in all messages but one, which has a list of parts (the chat format allows both). The field
#               becomes `Json`. Then text that is itself JSON, or nearly, is parsed in the other rows: an answer `007`
#               becomes the number 7, `null` becomes None, an object becomes a dict. There is no warning.
#            2. All answers of a file are dates or times in ISO 8601. The column becomes `timestamp[s]`; the time zone is
#               applied and dropped. A chosen and a rejected answer that differ become equal. With `features` that say
#               `Value("string")` the text is still read as a time first, and written in another form.
# Seen       answers of six rows
#              all content is text:    '007'  'null'  '{"a": 1.50}'  '"yes"'  '1e3'  'plain'
#              one row has parts:      7  None  {'a': 1.5}  'yes'  1000.0  'plain'
#            pair of a file of times
#              in the file:            '2024-02-29T12:00:00+02:00'  '2024-02-29T10:00:00'
#              loaded:                 datetime.datetime(2024, 2, 29, 10, 0)  datetime.datetime(2024, 2, 29, 10, 0)
#              loaded as strings:      '2024-02-29 10:00:00'  '2024-02-29 10:00:00'
# Matters    Answers in JSON are common in preference data for tools and for structured output. A chat template renders a
#            parsed one as other text, or fails on None. Whether it happens depends on other rows of the file.
#            Python's `json`, line by line, gives the strings of the file.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install datasets==5.2.0 pyarrow==26.0.1
} >&2 || exit 2
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PYTHON'
import datetime
import json
import sys

from datasets import Features, Value, disable_progress_bars, load_dataset

disable_progress_bars()


def load(name, rows, **options):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=name, split="train", cache_dir="cache", **options)


def row(content):
    question, refusal = {"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}
    return {"chosen": [question, {"role": "assistant", "content": content}], "rejected": [question, refusal]}


def answers(dataset):
    return [each["chosen"][-1]["content"] for each in dataset][: len(texts)]


texts = ["007", "null", '{"a": 1.50}', '"yes"', "1e3", "plain"]
parts = [{"type": "text", "text": "An answer in parts."}]
of_text = answers(load("text.jsonl", [row(text) for text in texts]))
of_both = answers(load("both.jsonl", [row(text) for text in texts] + [row(parts)]))
print("answers of six rows")
print("  all content is text:  ", *map(repr, of_text), sep="  ")
print("  one row has parts:    ", *map(repr, of_both), sep="  ")

pair = {"chosen": "2024-02-29T12:00:00+02:00", "rejected": "2024-02-29T10:00:00"}
times = load("times.jsonl", [pair])[0]
typed = load("times.jsonl", [pair], features=Features({name: Value("string") for name in pair}))[0]
print("pair of a file of times")
print("  in the file:          ", *map(repr, pair.values()), sep="  ")
print("  loaded:               ", *map(repr, times.values()), sep="  ")
print("  loaded as strings:    ", *map(repr, typed.values()), sep="  ")

same = datetime.datetime(2024, 2, 29, 10, 0)
still = (
    of_text == texts
    and of_both == [7, None, {"a": 1.5}, "yes", 1000.0, "plain"]
    and times == {"chosen": same, "rejected": same}
    and typed == {"chosen": "2024-02-29 10:00:00", "rejected": "2024-02-29 10:00:00"}
)
sys.exit(0 if still else 1)
PYTHON
