"""Reads the first rows of a run's data as the run will: what the columns are, what can be used, what a row becomes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import DataConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.first_row import FirstRow, understood
from sampo_ray.data.preferences import columns_json, tokenized_pairs, tokenized_prompts
from sampo_ray.data.rewards import Samples
from sampo_ray.data.template import ADVICE
from sampo_ray.errors import ConfigError
from sampo_ray.run.directory import Run
from sampo_ray.run.parts import parts_of
from sampo_ray.sources.rows import Counts, Kind, Row, first_rows

PROBED = 1000
"""Rows in which a column that a reward function names must be found."""

TRIED = 100
"""Usable rows of a source on which the chat template is tried."""


@dataclass(frozen=True)
class CheckedSource:
    """What the first rows of a source show. `notes` are for everybody, `details` for a dry run."""

    rows: list[Row]
    notes: list[str]
    details: list[str]
    first: FirstRow


def check_source(config: RunConfig, chat: ChatFormat) -> CheckedSource:
    """Tries the chat template on the first rows of a run's data. ConfigError, DataError."""
    kind: Kind = "prompts" if config.online else "pairs"
    field, source = f"data.{'prompts' if config.online else 'train'}", config.data.names(config.online)[0]
    rows = first_rows(source, kind, PROBED)
    counts, first = try_format(rows[:TRIED], kind, chat, config.limits, field)
    notes = [f"{field}: {each}" for each in _counted(counts)]
    details = [f"{field}: {each}" for each in _unused(rows, kind)]
    return CheckedSource(rows, notes, details, understood(first, chat, config.limits))


def tokenized_rows(run: Run) -> list[Row]:
    """The first prompts of a run that has tokenized them."""
    table = next(part.table() for part in parts_of(run.place.at("data"), run.manifest.data.rows) if part.rows)
    texts = zip(*(table[name].to_pylist() for name in ("id", "messages", "columns")), strict=True)
    return [Row(id, id, json.loads(messages), None, None, json.loads(columns)) for id, messages, columns in texts]


def try_format(rows: Sequence[Row], kind: Kind, chat: ChatFormat, data: DataConfig, field: str) -> tuple[Counts, Row]:
    """Tokenizes rows of the source that `field` names: what can be used of them, and the first that can.

    ConfigError if none can.
    """
    counts = Counts(rows=len(rows))
    blocks = (
        tokenized_pairs(rows, chat, data, counts)
        if kind == "pairs"
        else tokenized_prompts(rows, chat, data.prompt_limit, counts)
    )
    ids = [id for block in blocks for id in block["id"].to_pylist()]
    if not ids:
        (reason, _), *_ = counts.dropped.most_common(1)
        advice = ADVICE.get(reason, "raise data.max_length, or name other data")
        raise ConfigError(
            f"{field}: no row of the first {counts.rows} can be used: {reason} (first at {counts.first[reason]}); "
            f"{advice}"
        )
    return counts, next(row for row in rows if row.id == ids[0])


def _counted(tried: Counts) -> list[str]:
    """What of the first rows can be used."""
    if not (tried.dropped or tried.prompts_cut or tried.responses_cut):
        return []
    cut = f"; cut to length: {tried.prompts_cut} prompts, {tried.responses_cut} responses"
    return [f"{tried.usable} of the first {tried.rows} rows can be used{_dropped(tried)}{cut}"]


def _dropped(counts: Counts) -> str:
    return "".join(f"; {reason}: {n:,} (first at {counts.first[reason]})" for reason, n in counts.dropped.most_common())


def _unused(rows: Sequence[Row], kind: Kind) -> list[str]:
    names = ", ".join(dict.fromkeys(name for row in rows for name in row.columns))
    use = "not used" if kind == "pairs" else "for reward functions"
    return [f"{use}: {names}"] if names else []


def made_up_samples(rows: Sequence[Row], chat: ChatFormat) -> Samples:
    """Two made-up completions of the first row's prompt, one of them empty, with the columns that any of `rows` has."""
    texts = ["I do not know.", ""]
    columns = json.loads(columns_json(rows[0]))
    return Samples(
        [rows[0].prompt for _ in texts],
        texts,
        chat.encode_responses(texts),
        {name: [columns.get(name) for _ in texts] for row in rows for name in row.columns},
    )
