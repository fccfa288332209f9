"""AlpacaEval 2's files on this machine, and whether they are the official ones.

Length control goes by row: it has a difficulty for each of the 805 instructions, by position. Other rows or another
order give a number too, and a wrong one, so that all of this is refused. What is official is told by content, since
copies differ in form: digests of the texts, and sums over the columns of numbers.
"""

import csv
import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sampo_ray.errors import EvaluationError, first_line

ROWS = 805
BASELINE = "gpt4_1106_preview"
GAMED = ("gpt4_1106_preview_concise", "gpt4_1106_preview_verbose")
"""Models of df_gamed.csv, in its order."""
BASELINE_FILES = ("alpaca_eval_gpt4_baseline.json", "*gpt4*baseline*.json*", "*gpt4_1106_preview*.json*")
GAMED_FILES = ("df_gamed.csv", "df_gamed*.csv")
DIFFICULTY_FILES = ("instruction_difficulty.csv", "instruction_difficulty*.csv")
"""Names to look for in a folder: the official one, then others that are common."""

INSTRUCTIONS = "b320144cab4bc1ba31e6e1d97639272b61313fa3995d00fd600ef6f3f4918a0e"
ANY_ORDER = "1a88f1a04b09a6f98cdf1fa50f9ca38c1f5b6bbcc8696a8e0e9bcdf28845df13"
OUTPUTS = "be2e53c2482dd1d915b0e3b48be61e432ff8a9f656c1870dcb4fc3b72926d8a9"
"""Digests of the 805 official instructions, of them sorted, and of the baseline's outputs; see `digest`."""
DIFFICULTY = (-45.9183, 1767.2678, -16.7895, 38.5569)
DELTAS = ((1149.5284, 2445.51, -2.9729, 22.6824), (-584.7118, 1228.7054, 7.1179, 4.3898))
"""`sums` of the official difficulties, and of the length differences of each gamed model."""
CLOSE = 0.05
GAMED_RATES, GAMED_ERRORS = (0.2292, 0.64304), (0.012325, 0.013349)
"""The gamed models' published win rates and their standard errors."""


@dataclass(frozen=True)
class AlpacaData:
    """The official instructions and the baseline's outputs, row by row, and the file that length control is fitted
    with. `notes`: what a result must say of them."""

    instructions: tuple[str, ...]
    outputs: tuple[str, ...]
    gamed: Path
    notes: tuple[str, ...] = ()


def open_data(folder: Path) -> AlpacaData:
    """EvaluationError, naming what was found, unless the folder holds the official files."""
    if not folder.is_dir():
        raise EvaluationError(f"alpaca_eval: {str(folder)!r} is no folder; name the one that holds {BASELINE_FILES[0]}")
    baseline = _find(folder, BASELINE_FILES)
    rows = read_outputs(baseline)
    check_instructions([row["instruction"] for row in rows], str(baseline))
    generators = Counter(str(row.get("generator", BASELINE)) for row in rows)
    if set(generators) != {BASELINE}:
        raise EvaluationError(f"{baseline}: outputs are of {', '.join(generators)}, not of the baseline {BASELINE}")
    outputs = [row["output"] for row in rows]
    if digest(outputs) != OUTPUTS:
        raise EvaluationError(
            f"{baseline}: these are not the official outputs of {BASELINE} (digest {digest(outputs)[:12]} instead of "
            f"{OUTPUTS[:12]}); use {BASELINE_FILES[0]} of the data set tatsu-lab/alpaca_eval"
        )
    gamed = _find(folder, GAMED_FILES)
    difficulty, notes = check_gamed(gamed)
    for apart in _named(folder, DIFFICULTY_FILES):
        _check_difficulty(apart, difficulty, gamed)
    return AlpacaData(tuple(row["instruction"] for row in rows), tuple(outputs), gamed, notes)


def read_outputs(file: Path) -> list[dict[str, str]]:
    """Rows with `instruction` and `output`, of a JSON list or JSON lines, gzipped or not. EvaluationError."""
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        found = (
            json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.splitlines() if line]
        )
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file}: cannot be read as JSON ({first_line(error)})") from None
    for number, row in enumerate(found, 1):
        for key in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise EvaluationError(
                    f"{file}: row {number} has no text {key!r}; each row needs instruction and output"
                )
    return list(found)


def check_instructions(instructions: Sequence[str], what: str) -> None:
    """EvaluationError unless these are the official instructions in their order."""
    if len(instructions) != ROWS:
        raise EvaluationError(
            f"{what}: has {len(instructions)} rows instead of {ROWS}; length control goes by row, so give all of them"
        )
    if twice := [number for number, each in enumerate(instructions, 1) if each in set(instructions[: number - 1])]:
        raise EvaluationError(f"{what}: row {twice[0]} repeats an instruction of an earlier row, so that others lack")
    if digest(instructions) == INSTRUCTIONS:
        return
    if digest(sorted(each.strip() for each in instructions)) == ANY_ORDER:
        raise EvaluationError(
            f"{what}: has the official instructions in another order; length control goes by row, so sort them as in "
            f"{BASELINE_FILES[0]}"
        )
    raise EvaluationError(
        f"{what}: these are not the {ROWS} official instructions (digest {digest(instructions)[:12]} instead of "
        f"{INSTRUCTIONS[:12]}); use those of the data set tatsu-lab/alpaca_eval"
    )


def check_gamed(file: Path) -> tuple[list[float], tuple[str, ...]]:
    """The difficulties of a df_gamed.csv, and notes on its preferences. EvaluationError unless it is the official one,
    but that its preferences may be others with the same means, which change the result in the third decimal."""
    columns = ("model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    rows = _read_csv(file, columns)
    wanted = [(model, str(index), "False") for model in GAMED for index in range(ROWS)]
    if [(row["model"], row["index"], row["not_gamed_baseline"]) for row in rows] != wanted:
        counts = ", ".join(f"{n} of {model}" for model, n in Counter(row["model"] for row in rows).items())
        raise EvaluationError(
            f"{file}: is not the official df_gamed.csv: it needs {ROWS} rows of {' and '.join(GAMED)} each, with index "
            f"0 to {ROWS - 1} in order; found {counts or 'none'}, or another order"
        )
    difficulty, exact = _numbers(file, rows, "instruction_difficulty"), True
    deltas, preferences = _numbers(file, rows, "std_delta_len"), _numbers(file, rows, "preference")
    for n, model in enumerate(GAMED):
        part = slice(n * ROWS, (n + 1) * ROWS)
        for name, values, official in (
            ("instruction_difficulty", difficulty[part], DIFFICULTY),
            ("std_delta_len", deltas[part], DELTAS[n]),
        ):
            if any(abs(a - b) > CLOSE for a, b in zip(sums(values), official, strict=True)):
                raise EvaluationError(
                    f"{file}: column {name} of {model} is not the official one; {_where('df_gamed.csv')}"
                )
        mean = sum(preferences[part]) / ROWS
        error = math.sqrt(sum((each - mean) ** 2 for each in preferences[part]) / (ROWS - 1) / ROWS)
        if abs(mean - GAMED_RATES[n]) > 1e-3:
            raise EvaluationError(
                f"{file}: preferences of {model} have the mean {mean:.4f}, and {GAMED_RATES[n]:.4f} was published; "
                f"{_where('df_gamed.csv')}"
            )
        exact &= abs(error - GAMED_ERRORS[n]) < 1e-4
    note = f"{file.name} holds reconstructed preferences of the gamed baselines, with the official means"
    return difficulty[:ROWS], () if exact else (note,)


def sums(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Sums of a column that change with its values and with their order."""
    return (
        math.fsum(values),
        math.fsum(each * each for each in values),
        math.fsum(each * math.cos(i) for i, each in enumerate(values)),
        math.fsum(each * math.sin(i) for i, each in enumerate(values)),
    )


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts without space around them, in their order."""
    return hashlib.sha256(json.dumps([each.strip() for each in texts], ensure_ascii=False).encode()).hexdigest()


def _check_difficulty(file: Path, difficulty: Sequence[float], gamed: Path) -> None:
    rows = _read_csv(file, ("instruction_difficulty",))
    found = _numbers(file, rows, "instruction_difficulty")
    if len(found) != ROWS or any(abs(a - b) > 1e-3 for a, b in zip(found, difficulty, strict=False)):
        raise EvaluationError(
            f"{file}: its {len(found)} difficulties are not those of {gamed.name}; {_where(DIFFICULTY_FILES[0])}"
        )


def _find(folder: Path, names: Sequence[str]) -> Path:
    found = _named(folder, names)
    if not found:
        raise EvaluationError(f"alpaca_eval: {folder} has no {names[0]}; {_where(names[0])}")
    if len(found) > 1:
        several = ", ".join(file.name for file in found)
        raise EvaluationError(f"alpaca_eval: {folder} holds {several}; keep the official one")
    return found[0]


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that match the first of the names that any matches."""
    return next((found for name in names if (found := sorted(folder.glob(name)))), [])


def _where(name: str) -> str:
    return f"use {name} of the data set tatsu-lab/alpaca_eval (nothing is downloaded)"


def _read_csv(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{file}: cannot be read ({first_line(error)})") from None
    if missing := [name for name in columns if not rows or name not in rows[0]]:
        raise EvaluationError(f"{file}: has no column {', '.join(missing)}, or no rows")
    return rows


def _numbers(file: Path, rows: Sequence[dict[str, str]], column: str) -> list[float]:
    try:
        values = [float(row[column]) for row in rows]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise EvaluationError(f"{file}: column {column} holds something else than finite numbers")
    return values
