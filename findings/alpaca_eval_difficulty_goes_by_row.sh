#!/usr/bin/env bash
# alpaca_eval: one answer less, or the rows in another order, changes the length-controlled win rate and its error
#
# Packages   alpaca_eval 0.6.6, scikit-learn 1.9.1, patsy 1.0.3, pandas 3.1.1, numpy 2.3.5, datasets 5.2.0,
#            huggingface_hub 2.4.0, setuptools 77.0.3. Python 3.11 or 3.12.
# Input      Answers of a model and of the baseline to 805 instructions, judged by a fixed table of preferences, and
#            `evaluate` with its default metric. All numbers are made up, but drawn as that metric's own model says; they
#            include the file of difficulties (`df_gamed.csv`, put into the hub's cache in its official form).
#            The same once without the model's first answer, once with both files reversed, once with `max_instances`.
# Expected   Nearly the same rates, since answers and preferences are the same, or an error.
# Happens    The win rate stays. The length-controlled one and its standard error are others. The difficulty of an
#            instruction is looked up by the number of its row, not by its text: without the first answer, each gets that of
#            the one before it. `max_instances` shuffles the rows first, so that even all 805 get difficulties of
#            others. Of the missing answer there is a warning, which speaks of the join and not of this; of the order none.
# Seen       all rows:                    win rate 5.85 +- 0.53, length-controlled 15.23 +- 0.82
#            without the first answer:    win rate 5.85 +- 0.53, length-controlled 14.10 +- 0.24
#            both files reversed:         win rate 5.85 +- 0.53, length-controlled 13.61 +- 0.24
#            max_instances=805:           win rate 5.85 +- 0.53, length-controlled 13.77 +- 0.27
# Matters    Leaderboards and papers compare models by this rate. Answers that were filtered, lost or sorted give one that
#            looks right. Give all 805 rows in the official order (a missing answer as an empty one), and no `max_instances`.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install alpaca_eval==0.6.6 scikit-learn==1.9.1 patsy==1.0.3 \
        pandas==3.1.1 numpy==2.3.5 datasets==5.2.0 huggingface_hub==2.4.0 setuptools==77.0.3
} >&2 || exit 2
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from alpaca_eval import evaluate
from alpaca_eval.annotators import PairwiseAnnotator

logging.disable(logging.WARNING)
ROWS = 805
draw = np.random.default_rng(0)
difficulty = draw.normal(0, 1.5, ROWS)


def preferences(strength, longer):
    """Between 0 and 1, for answers of a model that is so strong and so much longer (in standard deviations)."""
    return 1 / (1 + np.exp(-(strength + 2 * difficulty - 2 * np.tanh(longer) + draw.normal(0, 1, ROWS))))


gamed = []
for name, strength, mean in (("concise", -0.5, 1.0), ("verbose", 0.5, -1.0)):
    longer = draw.normal(mean, 1, ROWS)
    columns = {"model": f"gpt4_1106_preview_{name}", "preference": preferences(strength, longer), "index": range(ROWS)}
    columns |= {"std_delta_len": longer, "instruction_difficulty": difficulty, "not_gamed_baseline": False}
    gamed.append(pd.DataFrame(columns))
cache = Path(os.environ["HF_HOME"], "hub", "datasets--tatsu-lab--alpaca_eval")
(cache / "refs").mkdir(parents=True)
(cache / "refs" / "main").write_text("0" * 40)
(cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
pd.concat(gamed).to_csv(cache / "snapshots" / ("0" * 40) / "df_gamed.csv", index=False)

instructions = [f"Instruction {n}" for n in range(ROWS)]
lengths = draw.integers(500, 3000, ROWS), draw.integers(50, 700, ROWS)
longer = (lengths[0] - lengths[1]) / np.std(lengths[0] - lengths[1])
judged = dict(zip(instructions, 1 + preferences(-4.0, longer)))


class Judge(PairwiseAnnotator):
    """Pairs rows as the package does, and has the preference of each instruction at hand."""

    def __init__(self, **_):
        self.input_keys = ["instruction"]

    def __call__(self, rows, **_):
        return [{**row, "preference": judged[row["instruction"]]} for row in rows.to_dict("records")]


def outputs(generator, sizes):
    rows = zip(instructions, sizes)
    return [{"instruction": text, "output": "x" * int(size), "generator": generator} for text, size in rows]


def rates(what, model, baseline, **options):
    options |= {"metric_kwargs": {"save_weights_dir": None}, "output_path": None, "precomputed_leaderboard": None}
    board, _ = evaluate(model, baseline, Annotator=Judge, is_return_instead_of_print=True, **options)
    row = board.loc["model"]
    print(
        f"{what + ':':<28} win rate {row.win_rate:.2f} +- {row.standard_error:.2f}, "
        f"length-controlled {row.length_controlled_winrate:.2f} +- {row.lc_standard_error:.2f}"
    )
    return row


baseline, model = outputs("baseline", lengths[0]), outputs("model", lengths[1])
whole = rates("all rows", model, baseline)
others = [
    rates("without the first answer", model[1:], baseline),
    rates("both files reversed", model[::-1], baseline[::-1]),
    rates("max_instances=805", model, baseline, max_instances=ROWS),
]
alike = all(abs(row.win_rate - whole.win_rate) < 0.1 for row in others)
apart = all(abs(row.length_controlled_winrate - whole.length_controlled_winrate) > 0.5 for row in others)
sys.exit(0 if alike and apart else 1)
PYTHON
