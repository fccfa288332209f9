"""Preference data: rows as people write them, the token blocks a round is made of, and how scores become pairs.

Blocks are `pyarrow.Table`s with the schemas below, in the object store and in Parquet files alike.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from sampo_ray.config.data import DataConfig
from sampo_ray.data.sources import Record, fingerprint, read_records
from sampo_ray.errors import DataError
from sampo_ray.training.batching import Pair

if TYPE_CHECKING:
    from sampo_ray.data.chat import ChatFormat, Message


__all__ = [
    "COMPLETIONS",
    "PAIRS",
    "PROMPTS",
    "REFERENCE",
    "SCORES",
    "Counts",
    "DataError",
    "Row",
    "best_against_worst",
    "check_source",
    "cut_prompt",
    "fingerprint",
    "pairs_of",
    "read_rows",
    "tokenized_pairs",
    "tokenized_prompts",
    "with_reference",
]

_TOKENS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
_REFERENCES = ("chosen_ref", "rejected_ref")

PROMPTS = pa.schema(
    {
        "id": pa.string(),  # unique within a source
        "messages": pa.string(),  # JSON list of {role, content}, uncut
        "columns": pa.string(),  # JSON object: the row's other columns, for reward functions
        "prompt": _TOKENS,  # BOS ... the assistant's header
    }
)
COMPLETIONS = pa.schema(
    [
        *PROMPTS,
        ("sample", pa.int32()),
        ("completion", _TOKENS),  # with the end-of-turn token if finish_reason is "stop"
        ("text", pa.string()),  # without special tokens
        ("finish_reason", pa.string()),  # "stop" | "length"
        ("logprobs", _LOGPROBS),  # of each completion token, nats, as sampled
        ("first_version", pa.int64()),  # weights that gave the first token
        ("last_version", pa.int64()),  # weights that gave the last one
    ]
)
SCORES = pa.schema([*COMPLETIONS, ("reward", pa.float64())])  # null: scoring failed
PAIRS = pa.schema(
    {
        "id": pa.string(),
        "prompt": _TOKENS,
        "chosen": _TOKENS,
        "rejected": _TOKENS,
        "chosen_reward": pa.float64(),  # null offline
        "rejected_reward": pa.float64(),
    }
)
REFERENCE = pa.schema([*PAIRS, *((name, _LOGPROBS) for name in _REFERENCES)])  # per token, nats

Kind = Literal["pairs", "prompts"]

_LAYOUT_COLUMNS = {"id", "prompt_id", "prompt", "messages", "chosen", "rejected"}
_EXPECTED = {
    "pairs": "write prompt, chosen and rejected, as strings or as lists of messages that end in the answer",
    "prompts": "write prompt as a string, or prompt or messages as a list of messages that ends with the user",
}
_ROWS_PROBED = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row. `chosen` and `rejected` are None where only prompts are read; `columns` is what else it had."""

    id: str
    where: str
    prompt: list["Message"]
    chosen: str | None
    rejected: str | None
    columns: dict[str, Any]


@dataclass
class Counts:
    """What became of the rows of a source; filled while it is read."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    responses_cut: int = 0
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where it was met first."""

    @property
    def usable(self) -> int:
        return self.rows - self.dropped.total()

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def reasons(self) -> str:
        return ", ".join(f"{reason}: {n} (first at {self.first[reason]})" for reason, n in self.dropped.most_common())


class _Unusable(Exception):
    """A row that is dropped; the message is the reason it is counted under."""


def read_rows(source: str, kind: Kind, counts: Counts | None = None) -> Iterator[Row]:
    """Streams the usable rows of `source`; the others are counted by reason in `counts`.

    Ids are the rows' own (`id` or `prompt_id`), a repeated one with `#2`, `#3`, ... behind it, else the place in the
    source. Of the data only those ids stay in memory. Raises DataError for what cannot be read, and for a broken line.
    """
    return _rows(read_records(source), kind, Counts() if counts is None else counts)


def check_source(source: str, kind: Kind) -> Row:
    """Opens `source` and returns its first usable row. Raises DataError if there is none near its beginning."""
    counts = Counts()
    row = next(_rows(itertools.islice(read_records(source), _ROWS_PROBED), kind, counts), None)
    if row is None:
        raise _nothing_usable(source, kind, counts)
    return row


def tokenized_pairs(
    source: str, chat: "ChatFormat", data: DataConfig, counts: Counts, block_rows: int = 512
) -> Iterator[pa.Table]:
    """Streams PAIRS blocks of at most `block_rows` pairs, in the source's order, rewards null.

    A prompt is cut on the left to `data.prompt_limit` tokens (BOS stays), then each response on the right so that
    prompt plus response has at most `data.max_length`; one that is cut has no end-of-turn token. Raises DataError.
    """
    for rows in _blocks(read_rows(source, "pairs", counts), block_rows):
        rows, prompts = _encoded_prompts(rows, chat, data.prompt_limit, counts)
        chosen = chat.encode_responses([row.chosen or "" for row in rows])
        rejected = chat.encode_responses([row.rejected or "" for row in rows])
        kept = []
        for row, prompt, best, worst in zip(rows, prompts, chosen, rejected, strict=True):
            room = data.max_length - len(prompt)
            if len(best) < 2 or len(worst) < 2:  # nothing but the end-of-turn token
                counts.drop("response of zero tokens", row.where)
            elif best[:room] == worst[:room]:
                counts.drop("identical responses within max_length", row.where)
            else:
                counts.responses_cut += (len(best) > room) + (len(worst) > room)
                kept.append((row.id, prompt, best[:room], worst[:room]))
        if kept:
            yield _table(PAIRS, [*zip(*kept, strict=True), [None] * len(kept), [None] * len(kept)])
    if not counts.usable:
        raise _nothing_usable(source, "pairs", counts)


def tokenized_prompts(
    source: str, chat: "ChatFormat", prompt_limit: int, counts: Counts, block_rows: int = 512
) -> Iterator[pa.Table]:
    """Streams PROMPTS blocks of at most `block_rows` prompts, cut on the left to `prompt_limit` tokens (BOS stays)."""
    for rows in _blocks(read_rows(source, "prompts", counts), block_rows):
        rows, prompts = _encoded_prompts(rows, chat, prompt_limit, counts)
        if rows:
            messages = [json.dumps(row.prompt, ensure_ascii=False) for row in rows]
            columns = [json.dumps(row.columns, default=str) for row in rows]
            yield _table(PROMPTS, [[row.id for row in rows], messages, columns, prompts])
    if not counts.usable:
        raise _nothing_usable(source, "prompts", counts)


def cut_prompt(prompt: list[int], limit: int, bos_id: int | None) -> list[int]:
    """The last `limit` tokens of a prompt; a BOS in front stays in front and counts as one of them."""
    if len(prompt) <= limit:
        return prompt
    bos = prompt[:1] if prompt[0] == bos_id else []
    return bos + prompt[len(prompt) - limit + len(bos) :]


def best_against_worst(scores: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """SCORES -> PAIRS: per prompt, the best finished completion against the worst one; and prompts dropped by reason.

    A completion that was cut by the length limit is never chosen; one without a reward takes no part, counted as
    "completions without a reward". Equal rewards are broken by the lower sample number. Ids are the prompts'.
    """
    counts: Counter[str] = Counter()
    names = ("id", "sample", "reward", "finish_reason", "text")
    samples = list(zip(*(scores[name].to_pylist() for name in names), strict=True))
    by_prompt: dict[str, list[int]] = {}
    for index, (prompt_id, *_) in enumerate(samples):
        by_prompt.setdefault(prompt_id, []).append(index)
    picks: list[tuple[int, int]] = []
    for members in by_prompt.values():
        scored = sorted((i for i in members if samples[i][2] is not None), key=lambda i: samples[i][1])
        if unscored := len(members) - len(scored):
            counts["completions without a reward"] += unscored
        pick = _pick(scored, samples)
        if isinstance(pick, str):
            counts[pick] += 1
        else:
            picks.append(pick)
    best, worst = (pa.array([pick[side] for pick in picks], pa.int64()) for side in (0, 1))
    chosen, rejected = scores.take(best), scores.take(worst)
    columns = [chosen["id"], chosen["prompt"], chosen["completion"], rejected["completion"]]
    return pa.table([*columns, chosen["reward"], rejected["reward"]], schema=PAIRS), counts


def pairs_of(block: pa.Table) -> list[Pair]:
    """The pairs of a PAIRS or REFERENCE block; their arrays are views of it."""
    names = [name for name in ("prompt", "chosen", "rejected", *_REFERENCES) if name in block.column_names]
    pairs = list[Pair]()
    for batch in block.to_batches():
        columns = {name: _arrays(batch.column(name)) for name in names}
        rows = (dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True))
        pairs += [Pair(id=id, **row) for id, row in zip(batch.column("id").to_pylist(), rows, strict=True)]
    return pairs


def with_reference(block: pa.Table, pairs: Sequence[Pair]) -> pa.Table:
    """A PAIRS block as a REFERENCE block, with what the same pairs say of their reference."""
    for name in _REFERENCES:
        block = block.append_column(name, pa.array([getattr(pair, name) for pair in pairs], _LOGPROBS))
    return block


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = lists.values.to_numpy()
    return [values[begin:end] for begin, end in itertools.pairwise(lists.offsets.to_pylist())]


def _pick(scored: list[int], samples: Sequence[tuple[str, int, float, str, str]]) -> tuple[int, int] | str:
    """(best, worst) indices of a prompt's scored completions, or the reason why there is no pair."""
    if len(scored) < 2:
        return "fewer than two scored completions"
    finished = [i for i in scored if samples[i][3] == "stop"]
    if not finished:
        return "no finished completion"
    best = max(finished, key=lambda i: samples[i][2])  # max and min keep the first of equals
    worst = min(scored, key=lambda i: samples[i][2])
    if samples[best][2] == samples[worst][2]:
        tie = all(samples[i][2] == samples[best][2] for i in scored)
        return "tie" if tie else "only unfinished completions are better than the worst"
    if samples[best][4] == samples[worst][4]:
        return "identical texts"
    return best, worst


def _rows(records: Iterable[Record], kind: Kind, counts: Counts) -> Iterator[Row]:
    parse = _parse_pair if kind == "pairs" else _parse_prompt
    seen: dict[str, int] = {}
    for record in records:
        counts.rows += 1
        try:
            prompt, chosen, rejected = parse(record.values)
            row_id = _row_id(record, seen)
        except _Unusable as reason:
            counts.drop(str(reason), record.where)
            continue
        columns = {name: value for name, value in record.values.items() if name not in _LAYOUT_COLUMNS}
        yield Row(row_id, record.where, prompt, chosen, rejected, columns)


def _encoded_prompts(
    rows: list[Row], chat: "ChatFormat", limit: int, counts: Counts
) -> tuple[list[Row], list[list[int]]]:
    kept, rendered = [], []
    for row in rows:
        try:
            rendered.append(chat.render(row.prompt))
            kept.append(row)
        except ValueError:
            counts.drop("refused by the chat template", row.where)
    prompts = chat.encode_prompts(rendered)
    counts.prompts_cut += sum(len(prompt) > limit for prompt in prompts)
    return kept, [cut_prompt(prompt, limit, chat.bos_id) for prompt in prompts]


def _parse_pair(values: dict[str, Any]) -> tuple[list["Message"], str, str]:
    chosen_prompt, chosen = _response(values.get("chosen"))
    rejected_prompt, rejected = _response(values.get("rejected"))
    if chosen_prompt and rejected_prompt and chosen_prompt != rejected_prompt:
        raise _Unusable("chosen and rejected answer different prompts")
    prompt = _joined_prompt(values.get("prompt"), chosen_prompt or rejected_prompt)
    if not chosen.strip() or not rejected.strip():
        raise _Unusable("empty response")
    if chosen == rejected:
        raise _Unusable("identical responses")
    return prompt, chosen, rejected


def _parse_prompt(values: dict[str, Any]) -> tuple[list["Message"], None, None]:
    prompt = values.get("prompt")
    if prompt is None and values.get("messages") is not None:
        prompt = _messages(values["messages"])
        if prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    if prompt is None and isinstance(values.get("chosen"), list):
        prompt, _ = _response(values["chosen"])
    return _joined_prompt(prompt, []), None, None


def _response(value: Any) -> tuple[list["Message"], str]:
    """What comes before an answer within its own column (nothing, if it is a string), and the answer."""
    if value is None:
        raise _Unusable("no chosen or no rejected")
    if isinstance(value, str):
        _require_unicode(value)
        return [], value
    messages = _messages(value)
    if not messages:
        raise _Unusable("empty response")
    if messages[-1]["role"] != "assistant":
        raise _Unusable("wrong roles")
    return messages[:-1], messages[-1]["content"]


def _joined_prompt(prompt: Any, prefix: list["Message"]) -> list["Message"]:
    """The prompt column, or what chosen and rejected share, if they bring the prompt along."""
    if isinstance(prompt, str):
        _require_unicode(prompt)
        messages = prefix or [{"role": "user", "content": prompt}]
    elif prompt is None:
        messages = prefix
    else:
        messages = _messages(prompt)
        if prefix and messages[-len(prefix) :] != prefix:
            raise _Unusable("chosen and rejected answer different prompts")
    if not messages:
        raise _Unusable("no prompt")
    if messages[-1]["role"] != "user" or any(message["role"] == "system" for message in messages[1:]):
        raise _Unusable("wrong roles")
    if not messages[-1]["content"].strip():
        raise _Unusable("empty prompt")
    return messages


def _messages(value: Any) -> list["Message"]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _Unusable("neither text nor a list of messages")
    messages = [{"role": message.get("role"), "content": message.get("content")} for message in value]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise _Unusable("wrong roles")
        if not isinstance(message["content"], str):
            raise _Unusable("a message without text")
        _require_unicode(message["content"])
    return messages


def _require_unicode(text: str) -> None:
    """JSON can spell lone surrogates, which no tokenizer and no Arrow string takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable("not valid Unicode") from None


def _row_id(record: Record, seen: dict[str, int]) -> str:
    own = next((record.values[name] for name in ("id", "prompt_id") if record.values.get(name) is not None), None)
    if own is None:
        return record.position
    name = str(own)
    _require_unicode(name)
    while name in seen:
        seen[str(own)] += 1
        name = f"{own}#{seen[str(own)]}"
    seen[name] = 1
    return name


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while block := list(itertools.islice(rows, size)):
        yield block


def _table(schema: pa.Schema, columns: Sequence[Sequence[Any]]) -> pa.Table:
    arrays = [pa.array(column, type=column_field.type) for column, column_field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _nothing_usable(source: str, kind: Kind, counts: Counts) -> DataError:
    if not counts.rows:
        return DataError(f"data source {source!r}: holds no rows; {_EXPECTED[kind]}")
    return DataError(
        f"data source {source!r}: no usable row among {counts.rows} ({counts.reasons()}); {_EXPECTED[kind]}"
    )
