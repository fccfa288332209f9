"""The stages of a round as calls on the fleet: each takes parts and makes parts, and skips what is complete already."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray

from sampo_ray.config.data import DataConfig
from sampo_ray.config.rollout import RolloutConfig
from sampo_ray.config.run import RunConfig
from sampo_ray.data.layouts import Counts
from sampo_ray.data.preferences import best_against_worst, pairs_of, tokenized_pairs, tokenized_prompts
from sampo_ray.errors import DataError
from sampo_ray.loop.blocks import collect, is_lost, run_stage
from sampo_ray.run.feedback import as_jsonl, pairs_from, read_votes
from sampo_ray.run.manifest import Age, Tokenized
from sampo_ray.run.parts import Part, part_place
from sampo_ray.run.storage import Place
from sampo_ray.training.batching import Lengths, lengths_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse


PART_PAIRS = 512
PART_PROMPTS = 32
ITEM_SAMPLES = 8
"""Completions of one generator call, about: few, so that queues tell how busy a replica is; more than one, because with
a small model a call costs more than a completion."""
ASSIGN_SECONDS = 900.0
TOKENIZE_SECONDS = 24 * 3600.0

Progress = Callable[[int], None]


def _tokenized(
    out: Place, source: str, kind: str, tokenizer: Place, data: DataConfig, none_is_fine: bool = False
) -> Tokenized:
    """Tokenizes a source into parts, from its start even if some exist already."""
    from sampo_ray.data.chat import ChatFormat  # only here: it would cost every stage's processes seconds

    counts = Counts()
    with tokenizer.on_disk() as folder:
        chat = ChatFormat.load(folder, "tokenizer")
    blocks = (
        tokenized_pairs(source, chat, data, counts, PART_PAIRS)
        if kind == "pairs"
        else tokenized_prompts(source, chat, data.prompt_limit, counts, PART_PAIRS)
    )
    rows = []
    try:
        for index, block in enumerate(blocks):
            part_place(out, index).write_table(block)
            rows.append(block.num_rows)
    except DataError:
        if counts.usable or not none_is_fine:
            raise
    return Tokenized(
        rows=rows,
        rows_read=counts.rows,
        dropped=dict(counts.dropped),
        prompts_cut=counts.prompts_cut,
        responses_cut=counts.responses_cut,
    )


_tokenize = ray.remote(num_cpus=0.5)(_tokenized)


def tokenize(out: Place, source: str, kind: str, tokenizer: Place, data: DataConfig) -> Tokenized:
    """Tokenizes a source of preference pairs or prompts (`kind`) into parts."""
    return ray.get(_tokenize.remote(out, source, kind, tokenizer, data), timeout=TOKENIZE_SECONDS)


@dataclass(frozen=True)
class PairedVotes:
    """The tokenized pairs that `votes` of users made, and how many votes made none, by reason."""

    tokenized: Tokenized
    votes: int
    left: dict[str, int]


def _paired_votes(out: Place, run: Place, earlier: Sequence[Place], tokenizer: Place, data: DataConfig) -> PairedVotes:
    source, unpaired = out.at("pairs.jsonl"), out.at("left.json")
    if not source.exists():  # else an attempt that was cut off has chosen its votes
        used = {vote for place in earlier for votes in _votes_in(place.at("pairs.jsonl")) for vote in votes}
        rows, left = pairs_from(vote for vote in read_votes(run) if vote.id not in used)
        unpaired.write(json.dumps(left).encode())
        source.write(as_jsonl(rows))
    votes = sum(map(len, _votes_in(source)))
    tokenized = _tokenized(out, source.url, "pairs", tokenizer, data, none_is_fine=True)
    return PairedVotes(tokenized, votes, json.loads(unpaired.read()))


_feedback = ray.remote(num_cpus=0.5)(_paired_votes)


def _votes_in(pairs: Place) -> list[list[str]]:
    """The ids of the votes that each pair of a file comes from."""
    return [json.loads(line)["feedback"]["votes"] for line in pairs.read().splitlines()]


def feedback(out: Place, run: Place, earlier: Sequence[Place], tokenizer: Place, data: DataConfig) -> PairedVotes:
    """Tokenizes the pairs that a run's votes make, without votes that `earlier` stages of this kind have used.

    `pairs.jsonl` in `out` has the pairs with their sources.
    """
    return ray.get(_feedback.remote(out, run, earlier, tokenizer, data), timeout=TOKENIZE_SECONDS)


@ray.remote(num_cpus=0.2)
def _gather(out: Place, indices: np.ndarray, *tables: pa.Table) -> pa.Table:
    table = pa.concat_tables(tables).take(pa.array(indices)).combine_chunks()
    out.write_table(table)
    return table


def gather(parts: Sequence[Part], order: np.ndarray, out: Place, rows_per_part: int, progress: Progress) -> list[Part]:
    """The rows of `parts` in a new order, as parts of `rows_per_part`."""
    tables = [part.argument() for part in parts]
    chunks = [order[start : start + rows_per_part] for start in range(0, len(order), rows_per_part)]
    return run_stage(out, len(chunks), lambda i, place: _gather.remote(place, chunks[i], *tables), 2, progress)


def sample(
    generators: Callable[[int | None], "DeploymentHandle"],
    prompts: Sequence[Part],
    out: Place,
    rollout: RolloutConfig,
    seed: int,
    weights: tuple[str, int] | None,
    window: int,
    progress: Progress,
    enough: Callable[[], bool] = lambda: False,
) -> list[Part]:
    """Rollouts: COMPLETIONS for each part of prompts, drawn from (run, version) `weights`, or from those that a replica
    holds (None); a few prompts a call.

    `generators` says which replicas to ask for a version; asked again for each part, since that may change. Once there
    is `enough`, no further part is begun.
    """
    together, parts_at_once = max(1, ITEM_SAMPLES // rollout.samples), max(1, window // PART_PROMPTS)
    issued: dict[int, list[ray.ObjectRef]] = {}

    def start(index: int, place: Place) -> ray.ObjectRef:
        block, rows = prompts[index].argument(), range(prompts[index].rows)
        handle = generators(weights[1] if weights else None)

        def item(first: int) -> ray.ObjectRef:
            some = rows[first : first + together]
            how = rollout.samples, rollout.temperature, rollout.top_p, rollout.max_tokens, seed, weights
            return as_ref(handle.generate.remote(block, some, *how))

        # Of a part that is begun again, only the items of dead replicas are issued again.
        before = issued.get(index)
        issued[index] = [
            before[i] if before and not is_lost(before[i]) else item(first) for i, first in enumerate(rows[::together])
        ]
        if len(issued) > 2 * parts_at_once:
            del issued[next(iter(issued))]  # long complete, and held no longer than needed
        return collect.remote(place, *issued[index])

    return run_stage(out, len(prompts), start, parts_at_once, progress, enough)


@ray.remote(num_cpus=0.1)
def _ages(completions: pa.Table, version: int) -> np.ndarray:
    return version - completions["first_version"].to_numpy()


def age(completions: Sequence[Part], version: int) -> Age:
    """How many steps before `version` the weights were that completions were begun with."""
    ages = ray.get([_ages.remote(part.argument(), version) for part in completions], timeout=ASSIGN_SECONDS)
    steps = np.concatenate(ages)
    return Age(mean=float(steps.mean()), most=int(steps.max()))


def score(
    rewards: "DeploymentHandle", completions: Sequence[Part], out: Place, window: int, progress: Progress
) -> list[Part]:
    """SCORES for each part of completions."""

    def start(index: int, place: Place) -> ray.ObjectRef:
        return collect.remote(place, as_ref(rewards.score.remote(completions[index].argument())))

    return run_stage(out, len(completions), start, window, progress)


@ray.remote(num_cpus=0.1)
def _pair(out: Place, scores: pa.Table) -> pa.Table:
    pairs, counts = best_against_worst(scores)
    pairs = pairs.replace_schema_metadata({f"dropped:{reason}": str(n) for reason, n in counts.items()})
    out.write_table(pairs)
    return pairs


@ray.remote(num_cpus=0.1)
def _dropped(pairs: pa.Table) -> Counter[str]:
    metadata = {key.decode(): count for key, count in (pairs.schema.metadata or {}).items()}
    counts = {key: int(count) for key, count in metadata.items() if key.startswith("dropped:")}
    return Counter({key.removeprefix("dropped:"): count for key, count in counts.items()})


def pair(scores: Sequence[Part], out: Place) -> tuple[list[Part], Counter[str]]:
    """Best against worst for each part of scores, and how many prompts gave no pair, by reason."""
    parts = run_stage(out, len(scores), lambda i, place: _pair.remote(place, scores[i].argument()), 8)
    dropped = ray.get([_dropped.remote(part.argument()) for part in parts], timeout=ASSIGN_SECONDS)
    return parts, sum(dropped, Counter())


def reference(
    references: "DeploymentHandle",
    pairs: Sequence[Part],
    out: Place,
    weights: tuple[str, int],
    versions: Place,
    config: RunConfig,
    round: int,
    window: int,
    progress: Progress,
) -> list[Part]:
    """Each part of pairs with the token log-probs of the given (run, version) as reference."""

    def start(index: int, place: Place) -> ray.ObjectRef:
        block = pairs[index].argument()
        run, version = weights
        return as_ref(references.score.remote(block, run, version, versions.url, config, round, place.url))

    return run_stage(out, len(pairs), start, window, progress)


@ray.remote(num_cpus=0.1)
def _lengths(pairs: pa.Table) -> np.ndarray:
    return lengths_of(pairs_of(pairs))


def lengths(pairs: Sequence[Part]) -> Lengths:
    """[pairs, 3] token counts: all that the driver ever sees of a round's pairs."""
    return np.concatenate(ray.get([_lengths.remote(part.argument()) for part in pairs], timeout=ASSIGN_SECONDS))


def as_ref(response: "DeploymentResponse") -> ray.ObjectRef:
    """A Serve call's result as an object reference of this process, to hand on without looking at it."""
    return response._to_object_ref_sync(_timeout_s=ASSIGN_SECONDS)
