"""AlpacaEval 2's rates against the published leaderboard, and what would make them wrong."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.alpaca_data import (
    BASELINE,
    AlpacaData,
    check_gamed,
    check_instructions,
    open_data,
    read_outputs,
)
from sampo_ray.evaluation.win_rates import WinRates, check_answers, check_model, win_rates

pytest.importorskip("alpaca_eval")


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "alpaca_eval"


@pytest.fixture(scope="module")
def data(folder: Path) -> AlpacaData:
    return open_data(folder)


def annotations(folder: Path, model: str) -> tuple[list[str], list[float]]:
    lines = gzip.decompress((folder / "annotations" / f"{model}.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["output_2"] for row in rows], [row["preference"] for row in rows]


def rates_of(data: AlpacaData, folder: Path, model: str) -> WinRates:
    return win_rates(data, model, data.instructions, *annotations(folder, model))


PUBLISHED = {
    "FuseChat-Llama-3.1-8B-Instruct": (63.33158, 1.42251, 65.38623, 0.66689),
    "NullModel": (76.91979, 0.90901, 86.45781, 0.14180),
    "alpaca-7b": (2.59145, 0.48709, 5.87549, None),
}
"""Of the leaderboard: win rate, standard error, length-controlled win rate, its standard error; per cent."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rates_come_out(data: AlpacaData, folder: Path, model: str) -> None:
    found, (rate, error, controlled, controlled_error) = rates_of(data, folder, model), PUBLISHED[model]
    assert 100 * found.win_rate == pytest.approx(rate, abs=1e-4)
    assert 100 * found.win_rate_stderr == pytest.approx(error, abs=1e-4)
    assert 100 * found.length_controlled == pytest.approx(controlled, abs=1e-3)
    assert controlled_error is None or 100 * found.length_controlled_stderr == pytest.approx(controlled_error, abs=1e-3)
    assert found.count == 805 == len(found.at_equal_length)
    assert sum(found.at_equal_length) / 805 == pytest.approx(found.length_controlled)


def test_a_few_rows_without_a_verdict_are_left_out_and_many_are_no_score(data: AlpacaData, folder: Path) -> None:
    outputs, preferences = annotations(folder, "FuseChat-Llama-3.1-8B-Instruct")
    found = win_rates(data, "m", data.instructions, outputs, [*preferences[:785], *[None] * 20])
    assert found.count == 785 and 100 * found.length_controlled == pytest.approx(65.4, abs=1)
    with pytest.raises(EvaluationError, match="41 of 805 answers have no verdict"):
        win_rates(data, "m", data.instructions, outputs, [*preferences[:764], *[None] * 41])


def test_what_gives_a_wrong_number_is_refused(data: AlpacaData, folder: Path) -> None:
    outputs, preferences = annotations(folder, "NullModel")
    outputs = [f"{text}{'.' * (n % 7)}" for n, text in enumerate(outputs)]
    texts = data.instructions
    swapped = (texts[1], texts[0], *texts[2:])
    for message, *arguments in (
        ("400 rows instead of 805", "m", texts[:400], outputs[:400], preferences[:400]),
        ("804 rows instead of 805", "m", texts[:-1], outputs[:-1], preferences[:-1]),
        ("in another order", "m", swapped, outputs, preferences),
        ("row 805 repeats an instruction", "m", (*texts[:-1], texts[0]), outputs, preferences),
        ("not the 805 official instructions", "m", (*texts[:-1], "Why?"), outputs, preferences),
        ("add 1 to preferences between 0 and 1", "m", texts, outputs, [each - 1 for each in preferences]),
        ("preference 0 is not between", "m", texts, outputs, [0.0, *preferences[1:]]),
        ("preference nan is not between", "m", texts, outputs, [float("nan"), *preferences[1:]]),
        ("are these the baseline's outputs", "m", texts, data.outputs, preferences),
        ("is the baseline's name", BASELINE, texts, outputs, preferences),
        ("804 preferences instead of 805", "m", texts, outputs, preferences[:-1]),
    ):
        with pytest.raises(EvaluationError, match=message):
            win_rates(data, *arguments)
    with pytest.raises(EvaluationError, match="is the baseline's name"):
        check_model(BASELINE)
    with pytest.raises(EvaluationError, match="all 805 answers have 3 characters"):
        check_answers(["abc", "xyz"] * 402 + ["123"])


def test_the_reconstructed_file_of_gamed_models_is_named_in_the_result(data: AlpacaData) -> None:
    assert data.gamed.name == "df_gamed_reconstructed.csv" and "reconstructed preferences" in data.notes[0]


def copied(folder: Path, target: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The official files under their own names; returns their rows and lines, to be changed."""
    rows = read_outputs(folder / "reference_gpt4_1106_preview.jsonl.gz")
    lines = (folder / "df_gamed_reconstructed.csv").read_text().splitlines()
    write(target, rows, lines)
    return rows, lines


def write(target: Path, rows: list[dict[str, str]], lines: list[str]) -> None:
    (target / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    (target / "df_gamed.csv").write_text("\n".join(lines) + "\n")


def test_official_files_are_known_by_content_in_any_form(folder: Path, tmp_path: Path, data: AlpacaData) -> None:
    copied(folder, tmp_path)
    assert replace(open_data(tmp_path), gamed=data.gamed, notes=()) == replace(data, notes=())


def test_files_that_are_not_official_are_refused_with_what_was_found(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no alpaca_eval_gpt4_baseline.json"):
        open_data(tmp_path)
    with pytest.raises(EvaluationError, match="is no folder"):
        open_data(tmp_path / "none")
    rows, lines = copied(folder, tmp_path)
    fields = [line.split(",") for line in lines]

    def column(n: int, change: str) -> list[str]:
        """The lines with another value in a column of the tenth row."""
        return [
            ",".join([*each[:n], change, *each[n + 1 :]]) if at == 10 else ",".join(each)
            for at, each in enumerate(fields)
        ]

    other = [{**row, "output": f"{row['output']}!"} for row in rows]
    for message, *changed in (
        ("804 rows instead of 805", rows[:-1], lines),
        ("another order", [rows[1], rows[0], *rows[2:]], lines),
        ("not the official outputs", other, lines),
        ("outputs are of text_davinci_003", [{**row, "generator": "text_davinci_003"} for row in rows], lines),
        ("row 3 has no text 'output'", [*rows[:2], {"instruction": "x"}, *rows[3:]], lines),
        ("found 805 of gpt4_1106_preview_concise", rows, lines[:806]),
        ("or another order", rows, [lines[0], lines[2], lines[1], *lines[3:]]),
        ("column instruction_difficulty of gpt4_1106_preview_concise is not", rows, column(4, "5.5")),
        ("column std_delta_len of gpt4_1106_preview_concise is not", rows, column(3, "5.5")),
        ("column preference holds something else", rows, column(1, "")),
        ("have the mean", rows, column(1, "5.5")),
        ("has no column instruction_difficulty", rows, [line.rsplit(",", 2)[0] for line in lines]),
    ):
        write(tmp_path, *changed)
        with pytest.raises(EvaluationError, match=message):
            open_data(tmp_path)
    write(tmp_path, rows, lines)
    (tmp_path / "instruction_difficulty.csv").write_text("index,instruction_difficulty\n" + "0,1.0\n" * 805)
    with pytest.raises(EvaluationError, match="its 805 difficulties are not those of df_gamed.csv"):
        open_data(tmp_path)


def test_the_check_of_the_gamed_file_stands_alone(folder: Path) -> None:
    difficulty, _ = check_gamed(folder / "df_gamed_reconstructed.csv")
    assert len(difficulty) == 805
    with pytest.raises(EvaluationError, match="3 rows"):
        check_instructions(["a", "b", "c"], "mine")


def test_rates_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """Nothing is written into the package, no `.env` is taken over, and no network is used."""
    (tmp_path / ".env").write_text("OPENAI_API_KEY=from-a-file\n")
    script = f"""
import gzip, json, os, socket, time
begun = time.time()
from pathlib import Path
socket.socket.connect = None
from sampo_ray.evaluation.alpaca_data import open_data
from sampo_ray.evaluation.win_rates import win_rates
folder = Path({str(folder)!r})
data = open_data(folder)
rows = [json.loads(line) for line in gzip.open(folder / "annotations" / "alpaca-7b.jsonl.gz", "rt")]
win_rates(data, "m", data.instructions, [row["output_2"] for row in rows], [row["preference"] for row in rows])
import sklearn, alpaca_eval
from alpaca_eval.metrics import glm_winrate
assert glm_winrate.hf_hub_download.__module__.startswith("huggingface_hub")
assert not sklearn.get_config()["enable_metadata_routing"]
assert "OPENAI_API_KEY" not in os.environ
package = Path(alpaca_eval.__file__).parent
assert not [path for path in package.rglob("*.csv") if path.stat().st_mtime > begun]
assert [path.name for path in Path(".").iterdir()] == [".env"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
