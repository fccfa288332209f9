"""Blocks of token ids, which a round is made of, and how scored completions become preference pairs.

A block is a `pyarrow.Table` with one of these schemas, in the object store as in Parquet files.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sampo_ray.config.sections import DataConfig
from sampo_ray.data.conversations import answered, prompts_of
from sampo_ray.sources.messages import Unusable
from sampo_ray.sources.records import batches
from sampo_ray.sources.rows import Counts, Row
from sampo_ray.training.batching import Pair

if TYPE_CHECKING:
    from sampo_ray.data.chat import ChatFormat

_TOKENS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())
_REFERENCES = ("chosen_ref", "rejected_ref")

PROMPTS = pa.schema(
    {
        "id": pa.string(),  # unique within a source
        "messages": pa.string(),  # JSON list of messages as they are asked: rewards are for answers to these
        "columns": pa.string(),  # JSON object: the row's tools and other columns, passed to reward functions
        "prompt": _TOKENS,  # from BOS to the assistant's header
    }
)
COMPLETIONS = pa.schema(
    [
        *PROMPTS,
        ("sample", pa.int32()),
        ("completion", _TOKENS),  # with the end-of-turn token if finish_reason is "stop"
        ("text", pa.string()),  # without special tokens
        ("finish_reason", pa.string()),  # "stop" | "length"
        ("logprobs", _LOGPROBS),  # of each completion token, nats: the model's, before temperature and top-p
        ("first_version", pa.int64()),  # weights that sampled the first token
        ("last_version", pa.int64()),  # weights that sampled the last one
    ]
)
SCORES = pa.schema([*COMPLETIONS, ("reward", pa.float64())])  # null: scoring failed
PAIRS = pa.schema(
    {
        "id": pa.string(),
        **dict.fromkeys(("prompt", "chosen", "rejected"), _TOKENS),
        "chosen_reward": pa.float64(),  # null offline
        "rejected_reward": pa.float64(),
    }
)
REFERENCE = pa.schema([*PAIRS, *((name, _LOGPROBS) for name in _REFERENCES)])  # per token, nats


def tokenized_pairs(
    rows: Iterable[Row], chat: "ChatFormat", data: DataConfig, counts: Counts, block_rows: int = 512
) -> Iterator[pa.Table]:
    """Streams PAIRS blocks of at most `block_rows` pairs in the order of `rows`, rewards null.

    Each prompt is cut to `data.prompt_limit` tokens, by whole turns behind the system turn where that is enough, then
    each response on the right, so that prompt plus response have at most `data.max_length` tokens. A response that is
    cut has no end-of-turn token.
    """
    for block in batches(rows, block_rows):
        pairs = answered(prompts_of(block, chat, data.prompt_limit, counts), chat, data, counts)
        if pairs:
            kept = [(p.prompt.row.id, p.prompt.ids, p.chosen[: p.limit], p.rejected[: p.limit]) for p in pairs]
            yield _table(PAIRS, [*zip(*kept, strict=True), [None] * len(kept), [None] * len(kept)])


def tokenized_prompts(
    rows: Iterable[Row], chat: "ChatFormat", prompt_limit: int, counts: Counts, block_rows: int = 512
) -> Iterator[pa.Table]:
    """Streams PROMPTS blocks of at most `block_rows` prompts, each cut to `prompt_limit` tokens as those of pairs."""
    for block in batches(rows, block_rows):
        prompts = prompts_of(block, chat, prompt_limit, counts)
        if prompts:
            kept = [
                (p.row.id, json.dumps(p.asked.messages, ensure_ascii=False), columns_json(p.row), p.ids)
                for p in prompts
            ]
            yield _table(PROMPTS, [*zip(*kept, strict=True)])


def columns_json(row: Row) -> str:
    """A row's tools and other columns as PROMPTS hold them; what JSON does not know becomes text."""
    return json.dumps(row.columns | ({"tools": row.tools} if row.tools else {}), default=str)


class _Sample(NamedTuple):
    """A completion as far as pairing looks at it; `row` is its index in the block."""

    prompt_id: str
    number: int
    reward: float  # NaN: scoring failed
    finish_reason: str
    text: str
    row: int


def best_against_worst(scores: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """SCORES -> PAIRS: the best finished completion of each prompt against its worst, and dropped prompts by reason.

    A completion that was cut by the length limit is never chosen. One without a reward is left out and counted as
    "completions without a reward". Of equal rewards the lower sample number counts. Ids are the prompts'.
    """
    dropped: Counter[str] = Counter()
    columns = (scores[name].to_numpy().tolist() for name in ("id", "sample", "reward", "finish_reason", "text"))
    by_prompt: dict[str, list[_Sample]] = {}
    for sample in map(_Sample, *columns, range(scores.num_rows)):
        by_prompt.setdefault(sample.prompt_id, []).append(sample)
    picks: list[tuple[int, int]] = []
    for samples in by_prompt.values():
        scored = sorted((each for each in samples if not math.isnan(each.reward)), key=lambda each: each.number)
        if unscored := len(samples) - len(scored):
            dropped["completions without a reward"] += unscored
        try:
            picks.append(_best_and_worst(scored))
        except Unusable as reason:
            dropped[str(reason)] += 1
    chosen, rejected = (scores.take(pa.array([pick[side] for pick in picks], pa.int64())) for side in (0, 1))
    table = [chosen["id"], chosen["prompt"], chosen["completion"], rejected["completion"]]
    return pa.table([*table, chosen["reward"], rejected["reward"]], schema=PAIRS), dropped


def _best_and_worst(scored: Sequence[_Sample]) -> tuple[int, int]:
    """Rows of the completions of one prompt that become chosen and rejected. Raises Unusable."""
    if len(scored) < 2:
        raise Unusable("fewer than two scored completions")
    finished = [sample for sample in scored if sample.finish_reason == "stop"]
    if not finished:
        raise Unusable("no finished completion")
    best = max(finished, key=lambda sample: sample.reward)  # max and min keep the first of equals
    worst = min(scored, key=lambda sample: sample.reward)
    if best.reward == worst.reward:
        tie = all(sample.reward == best.reward for sample in scored)
        raise Unusable("tie" if tie else "only unfinished completions are better than the worst")
    if best.text == worst.text:
        raise Unusable("identical texts")
    return best.row, worst.row


def pairs_of(block: pa.Table) -> list[Pair]:
    """The pairs of a PAIRS or REFERENCE block; their arrays are views of it."""
    names = [name for name in ("prompt", "chosen", "rejected", *_REFERENCES) if name in block.column_names]
    pairs = list[Pair]()
    for batch in block.to_batches():
        columns = [_arrays(batch.column(name)) for name in names]
        rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
        pairs += [Pair(id=id, **row) for id, row in zip(batch.column("id").to_pylist(), rows, strict=True)]
    return pairs


def with_reference(block: pa.Table, pairs: Sequence[Pair]) -> pa.Table:
    """A PAIRS block as a REFERENCE block: with the reference log-probs of the same `pairs`."""
    for name in _REFERENCES:
        block = block.append_column(name, pa.array([getattr(pair, name) for pair in pairs], _LOGPROBS))
    return block


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = lists.values.to_numpy()
    return [values[begin:end] for begin, end in itertools.pairwise(lists.offsets.to_pylist())]


def _table(schema: pa.Schema, columns: Iterable[Sequence[object]]) -> pa.Table:
    return pa.table([pa.array(each, field.type) for each, field in zip(columns, schema, strict=True)], schema=schema)
