"""Reads the first rows of a run's data as the run will: what the columns are, what can be used, what a row becomes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sampo_ray.config.columns import Columns, ColumnsOfSources
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
from sampo_ray.sources.answers import paths_of
from sampo_ray.sources.described import Entry, dropped
from sampo_ray.sources.probing import Probe, probe
from sampo_ray.sources.reading import said
from sampo_ray.sources.rows import Counts, Kind, Row, cut_to_length
from sampo_ray.sources.source import sources_of

TRIED = 100
"""Usable rows of a source on which the chat template is tried."""


@dataclass(frozen=True)
class CheckedSource:
    """What the first rows of a source show. `notes` are for everybody, `details` for a dry run."""

    columns: Columns
    rows: list[Row]
    notes: list[str]
    details: list[str]
    first: FirstRow


def check_sources(config: RunConfig, chat: ChatFormat) -> list[CheckedSource]:
    """Finds the columns of each source of a run, and tries the chat template on its rows. ConfigError, DataError."""
    kind: Kind = "prompts" if config.online else "pairs"
    sources, field = sources_of(config.data, kind), f"data.{'prompts' if config.online else 'train'}"
    found = [probe(Entry(each.name, n, len(sources)), kind, each.columns) for n, each in enumerate(sources)]
    fields = [field] if len(sources) == 1 else [f"{field}.{n}" for n in range(len(sources))]
    return [_checked(name, each, kind, chat, config) for name, each in zip(fields, found, strict=True)]


def check_probe(named: str, chat: ChatFormat, config: RunConfig) -> CheckedSource:
    """Finds the columns of the file of probe prompts, `evaluate.prompts`, and tries the chat template on its rows."""
    return _checked("evaluate.prompts", probe(Entry(named, 0, 1), "prompts", Columns()), "prompts", chat, config)


def columns_of(found: Sequence[CheckedSource]) -> ColumnsOfSources:
    """`data.columns` with nothing left open."""
    columns = tuple(each.columns for each in found)
    return columns[0] if len(columns) == 1 else columns


def _checked(field: str, found: Probe, kind: Kind, chat: ChatFormat, config: RunConfig) -> CheckedSource:
    counts, first = try_format(found.rows[:TRIED], kind, chat, config.limits, field)
    notes = [f"{field}: {each}" for each in (said(found.columns), *_counted(found, counts))]
    details = [f"{field}: {each}" for each in _unused(found, kind)]
    return CheckedSource(found.columns, found.rows, notes, details, understood(first, chat, config.limits))


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


def _counted(found: Probe, tried: Counts) -> list[str]:
    """How many of the probed rows can be used, and of those that were tried with the chat template."""
    lines = [f"rows probed: {found.counts.rows:,}; usable: {found.counts.usable:,}{_dropped(found.counts)}"]
    if found.skipped.rows:
        lines.insert(0, f"skipped: the first {found.skipped.rows:,} rows{_dropped(found.skipped)}")
    if tried.dropped or tried.prompts_cut or tried.responses_cut:
        cut = f"; {cut_to_length(tried.prompts_cut, tried.questions_cut, tried.responses_cut)}"
        lines.append(f"of these tokenized: {tried.rows}; usable: {tried.usable}{_dropped(tried)}{cut}")
    return lines


def _dropped(counts: Counts) -> str:
    return f"; dropped: {dropped(counts)}" if counts.dropped else ""


def _unused(found: Probe, kind: Kind) -> list[str]:
    """The columns that rows are not read from."""
    paths = () if kind == "prompts" else (found.columns.verdict, found.columns.score, found.columns.rank)
    used = {path.partition(".")[0] for each in paths for path in paths_of(each)}
    names = [name for name in dict.fromkeys(name for row in found.rows for name in row.columns) if name not in used]
    return [f"{'not used' if kind == 'pairs' else 'for reward functions'}: {', '.join(names)}"] if names else []


def made_up_samples(rows: Sequence[Row], chat: ChatFormat) -> Samples:
    """Two made-up completions of the first row's prompt, one of them empty, with the columns that any of `rows` has."""
    texts = ["I do not know.", ""]
    columns = json.loads(columns_json(rows[0]))
    return Samples(
        [rows[0].prompt for _ in texts],
        texts,
        chat.encode_responses(texts),
        {name: [columns.get(name) for _ in texts] for row in rows for name in json.loads(columns_json(row))},
    )
