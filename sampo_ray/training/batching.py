"""From tokens to rows: which pairs share a step, a rank and a row, planned from lengths alone.

The plan of a round is a pure function of (lengths, budget, seed, round), so every rank computes it for itself and a
restarted one finds its place.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sampo_ray.config.rows import RowBudget
from sampo_ray.training.streams import Stream

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64

ROW_MULTIPLE = 64
"""Rows are filled up to a multiple of this many tokens, as matrix kernels round differently for a few rows."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A prompt with a chosen and a rejected response, in tokens.

    `chosen_ref`, `rejected_ref`: the reference's log-probs of the responses' tokens, nats, once it has scored the pair;
    NaN at tokens that were not selected.
    """

    id: str
    prompt: Int32[np.ndarray, " prompt"]
    chosen: Int32[np.ndarray, " chosen"]
    rejected: Int32[np.ndarray, " rejected"]
    chosen_ref: Float32[np.ndarray, " chosen"] | None = None
    rejected_ref: Float32[np.ndarray, " rejected"] | None = None


Pairs: TypeAlias = "Sequence[Pair] | Mapping[int, Pair]"
"""Pairs by their index in a round: all of them, or those that are needed."""

Lengths: TypeAlias = "Int32[np.ndarray, 'pairs 3']"
"""Tokens of prompt, chosen and rejected."""

HELD_TOKENS = 2**22
"""Of a round's pairs that a rank holds, at most (16 MB of token ids, and their reference log-probs)."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: `rows[rank]` are the micro-batches of a rank, each an array of pair indices (maybe empty).

    `batch` are the pairs of all ranks in the order of the epoch, in which `first` pairs come before them.
    """

    index: int
    epoch: int
    first: int
    batch: Int64[np.ndarray, " pairs"]
    rows: tuple[tuple[Int64[np.ndarray, " pairs"], ...], ...]

    @property
    def pairs(self) -> int:
        return len(self.batch)


def steps_in_round(pairs: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a round; the last batch of an epoch may be smaller."""
    return -(-pairs // batch_size) * epochs


def plan_round(
    lengths: Lengths, budget: RowBudget, *, epochs: int, seed: int, round: int, after: int = 0
) -> Iterator[Step]:
    """The steps of a round that come after step `after`, in order; they are numbered from 1."""
    index = 0
    for epoch in range(epochs):
        starts = range(0, len(lengths), budget.batch_size)
        if (index := index + len(starts)) <= after:
            continue
        order = epoch_order(len(lengths), seed=seed, round=round, epoch=epoch)
        for number, first in enumerate(starts, start=index - len(starts) + 1):
            if number > after:
                batch = order[first : first + budget.batch_size]
                rows = plan_rows(batch, lengths, budget)
                by_rank = tuple(tuple(rows[rank :: budget.world]) for rank in range(budget.world))
                yield Step(number, epoch, first, batch, by_rank)


def epoch_order(pairs: int, *, seed: int, round: int, epoch: int) -> Int64[np.ndarray, " pairs"]:
    """The order of the pairs in an epoch: in the first as they are stored (stored order is shuffled already), in later
    ones permuted."""
    stored = np.arange(pairs)
    if not epoch:
        return stored
    return Stream.EPOCH_ORDER.generator(seed=seed, round=round, epoch=epoch).permutation(stored)


def has_parts_of_its_own(lengths: Lengths, epochs: int) -> bool:
    """Whether later epochs are read from parts in their own order: the pairs are too many to be held from the first
    epoch on, and those of one step are spread over as many parts of the stored order."""
    return epochs > 1 and int(lengths.sum()) > HELD_TOKENS


def plan_rows(pairs: Int64[np.ndarray, " pairs"], lengths: Lengths, budget: RowBudget) -> list[np.ndarray]:
    """Rows of at most `tokens_per_row` tokens (or a longer pair), the longest first; each rank takes every `world`-th.

    Each row is a collective operation, in which all ranks wait for the one with the most tokens. So there are as few
    rows as possible, the same number for each rank (the last may be empty), and they are filled evenly: each pair, the
    longest first, goes to the row that has the fewest tokens so far. Where answers do not share their prompt, rows are
    of pairs of similar length.
    """
    if not budget.shared_prompts:
        return _plan_by_length(pairs, lengths, budget)
    totals = lengths[pairs].sum(axis=1)
    longest_first = [(int(totals[i]), int(pairs[i])) for i in np.argsort(-totals, kind="stable")]
    rows_per_rank = max(1, -(-int(totals.sum()) // (budget.tokens_per_row * budget.world)))
    while (rows := _fill_rows(longest_first, rows_per_rank * budget.world, budget.tokens_per_row)) is None:
        rows_per_rank += 1
    return [np.array(members, dtype=np.int64) for _, members in sorted(rows, key=lambda row: -row[0])]


def _fill_rows(items: list[tuple[int, int]], count: int, capacity: int) -> list[tuple[int, list[int]]] | None:
    """`count` rows as (tokens, pairs), filled evenly with `items` (tokens, pair); None if these do not fit."""
    rows: list[tuple[int, int, list[int]]] = [(0, row, []) for row in range(count)]
    for tokens, pair in items:
        used, row, members = rows[0]
        if used and used + tokens > capacity:
            return None
        heapq.heapreplace(rows, (used + tokens, row, [*members, pair]))
    return [(used, members) for used, _, members in sorted(rows, key=lambda row: row[1])]


def _plan_by_length(pairs: Int64[np.ndarray, " pairs"], lengths: Lengths, budget: RowBudget) -> list[np.ndarray]:
    """`plan_rows` for answers behind prompts of their own, padded: cut from the pairs in order of their longer one."""
    answers = lengths[pairs, :1] + lengths[pairs, 1:]
    order = np.argsort(-answers.max(axis=1), kind="stable")
    answers = answers[order]
    rows = len(cuts := _cut_by_length(answers, budget.tokens_per_row))
    rows += -rows % budget.world
    low, high = 0, budget.tokens_per_row  # the fewest tokens with which no more rows are needed are the most even ones
    while high - low > max(1, budget.tokens_per_row // 64):
        middle = (low + high) // 2
        if len(tried := _cut_by_length(answers, middle)) <= rows:
            cuts, high = tried, middle
        else:
            low = middle
    planned = np.split(pairs[order], cuts[1:])
    return planned + [pairs[:0]] * (rows - len(planned))


def _cut_by_length(answers: Int64[np.ndarray, "pairs 2"], capacity: int) -> list[int]:
    """Where rows of at most `capacity` tokens, or one pair, begin in pairs that are in order of length."""
    cuts = [0]
    for end in range(1, len(answers)):
        if padded_tokens(answers[cuts[-1] : end + 1].ravel()) > capacity:
            cuts.append(end)
    return cuts


def split(lengths: Int64[np.ndarray, " sequences"], boundary: int | None = None) -> int:
    """How many of at least two sequences, the longest first, are in the first of two batches.

    As few tokens as possible are padding. Where some are longer than `boundary` and some are not, it is between these:
    a model's frequencies may depend on the longest sequence of a batch.
    """
    if boundary is not None and 0 < (longer := int((lengths > boundary).sum())) < len(lengths):
        return longer
    return 1 + int(np.argmin(_padded(lengths)))


def padded_tokens(lengths: Int64[np.ndarray, " sequences"]) -> int:
    """Tokens of the two batches of at least two sequences, padding included; these in any order."""
    return int(_padded(-np.sort(-lengths)).min())


def _padded(lengths: Int64[np.ndarray, " sequences"]) -> Int64[np.ndarray, " splits"]:
    """Tokens of two batches by where sequences, the longest first, are split: after the first, the second, ..."""
    first = np.arange(1, len(lengths))
    padded: Int64[np.ndarray, " splits"] = first * lengths[0] + (len(lengths) - first) * lengths[1:]
    return padded


@dataclass(frozen=True)
class Segments:
    """Where one pair lies in a row: chosen, then rejected, and the prompt that both see, which is computed once: just
    before the responses, or with an earlier pair of the row that has the same.
    """

    prompt_start: int
    prompt: int
    chosen_start: int
    chosen: int
    rejected: int

    @property
    def shares_prompt(self) -> bool:
        """Whether the prompt lies with an earlier pair."""
        return self.prompt_start + self.prompt < self.chosen_start

    @property
    def rejected_start(self) -> int:
        return self.chosen_start + self.chosen

    @property
    def end(self) -> int:
        return self.rejected_start + self.rejected


@dataclass(frozen=True)
class Row:
    """A micro-batch: pairs end to end in one row of tokens, with padding only at its end.

    `positions`: each prompt begins at 0, each response where its prompt ended.
    """

    tokens: Int64[Tensor, " tokens"]
    positions: Int64[Tensor, " tokens"]
    segments: tuple[Segments, ...]

    def to(self, device: torch.device | str) -> Row:
        return Row(self.tokens.to(device), self.positions.to(device), self.segments)


def assemble(pairs: Sequence[Pair]) -> Row:
    """A row of these pairs, filled up to a multiple of ROW_MULTIPLE tokens; it holds a prompt of several pairs once."""
    tokens, positions, segments, end = list[np.ndarray](), list[np.ndarray](), list[Segments](), 0
    prompts: dict[bytes, int] = {}
    for pair in pairs:
        prompt = len(pair.prompt)
        if (start := prompts.setdefault(pair.prompt.tobytes(), end)) == end:
            tokens.append(pair.prompt)
            positions.append(np.arange(prompt))
            end += prompt
        segments.append(Segments(start, prompt, end, len(pair.chosen), len(pair.rejected)))
        end = segments[-1].end
        for response in (pair.chosen, pair.rejected):
            tokens.append(response)
            positions.append(np.arange(prompt, prompt + len(response)))
    fill = np.zeros(-end % ROW_MULTIPLE, np.int64)
    joined, places = (np.concatenate([*parts, fill]).astype(np.int64) for parts in (tokens, positions))
    return Row(torch.from_numpy(joined), torch.from_numpy(places), tuple(segments))


def lengths_of(pairs: Sequence[Pair]) -> Lengths:
    """[pairs, 3] token counts."""
    counts = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return np.array(counts, np.int32).reshape(-1, 3)


def predecessors(segments: tuple[Segments, ...], tokens: int) -> Int64[Tensor, " tokens"]:
    """Of each token of a row the position of the one before it in its text: of an answer's first, its prompt's last."""
    before = np.arange(-1, tokens)
    for pair in segments:
        before[[pair.chosen_start, pair.rejected_start]] = pair.prompt_start + pair.prompt - 1
    return torch.from_numpy(before[:tokens].clip(0))
