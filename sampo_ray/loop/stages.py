"""The stages of a round as calls on the fleet: each takes parts and makes parts, and skips what is complete already."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from sampo_ray.actors.policy.messages import RolloutRequest
from sampo_ray.config.columns import Columns
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import DataConfig, FleetConfig, RolloutConfig
from sampo_ray.data.length_control import Moments, fit, moments_of, without_length
from sampo_ray.data.length_fit import LengthFit
from sampo_ray.data.preferences import best_against_worst
from sampo_ray.errors import StageError
from sampo_ray.judging.tally import Tally, tally_of
from sampo_ray.loop.blocks import NotTakenError, StageOutput, collect, is_lost, of_each, run_stage
from sampo_ray.loop.tokenizing import Tokenizing, record_of, tables, tasks_at_once
from sampo_ray.run.feedback import as_jsonl, pairs_from, read_votes
from sampo_ray.run.manifest import Age, StageRecord
from sampo_ray.run.parts import Part, part_place
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId
from sampo_ray.sources.chunks import decoded
from sampo_ray.sources.rows import Counts
from sampo_ray.sources.source import Source
from sampo_ray.training.batching import Lengths

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

PART_PAIRS = 512
PART_PROMPTS = 32
CALL_SAMPLES = 8
"""Completions of one generator call, about: few, so that queues tell how busy a replica is; more than one, because with
a small model a call costs more than a completion."""
PAIRINGS_AT_ONCE = 8
ASSIGN_S, VOTES_S = 900.0, 3600.0
"""Until a replica takes a call; for all votes."""

VOTED = Columns.model_validate(
    dict.fromkeys(Columns.model_fields) | {name: name for name in ("prompt", "chosen", "rejected")}
)
"""The columns of the pairs that votes make."""


def _paired_votes(out: Place, run: Place, earlier: Sequence[Place], tokenizer: Place, data: DataConfig) -> StageRecord:
    source, unpaired = out.at("pairs.jsonl"), out.at("left.json")
    if not source.exists():  # else an attempt that was interrupted has chosen its votes
        used = {vote for place in earlier for vote in _votes_in(place.at("pairs.jsonl"))}
        rows, left = pairs_from(vote for vote in read_votes(run) if vote.id not in used)
        unpaired.write(json.dumps(left).encode())
        source.write(as_jsonl(rows))
    what, counts = Tokenizing("pairs", [Source(source.url, VOTED, "feedback/")], 0, tokenizer, data), Counts()
    records = [record for _, content in what.reading.chunks() for record in decoded(content)]
    table = tables(records, VOTED, what, counts)
    if table.num_rows:
        part_place(out, 0).write_table(table)  # in one part: votes are few
    votes = {"votes": len(_votes_in(source)), "left": json.loads(unpaired.read())}
    return StageRecord(**record_of(counts, [table.num_rows] if table.num_rows else []), **votes)


def _votes_in(pairs: Place) -> list[str]:
    """The ids of the votes that a file's pairs come from."""
    return [vote for line in pairs.read().splitlines() for vote in json.loads(line)["feedback"]["votes"]]


def feedback(out: Place, run: Place, earlier: Sequence[Place], tokenizer: Place, data: DataConfig) -> StageRecord:
    """Tokenizes the pairs that a run's votes make, without votes that `earlier` stages of this kind have used.

    `pairs.jsonl` in `out` has the pairs with the votes they come from.
    """
    task = ray.remote(num_cpus=0.5)(_paired_votes)
    return ray.get(task.remote(out, run, earlier, tokenizer, data), timeout=VOTES_S)


def sample(
    generators: Callable[[int | None], "DeploymentHandle"],
    prompts: Sequence[Part],
    out: StageOutput,
    rollout: RolloutConfig,
    seed: int,
    weights: tuple[str, int] | None,
    window: int,
) -> list[Part]:
    """COMPLETIONS for each part of prompts, sampled from (run, version) `weights`, or from those that a replica has
    (None); a few prompts a call, about `window` prompts at a time.

    `generators` returns the replicas that serve a version. It is called again for each part, since they may change.
    """
    together, parts_at_once = max(1, CALL_SAMPLES // rollout.samples), max(1, window // PART_PROMPTS)
    issued: dict[int, list[ray.ObjectRef]] = {}

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        block, rows = prompts[index].argument(again), range(prompts[index].rows)
        handle = generators(weights[1] if weights else None)
        source = WeightsId(*weights) if weights else None
        request = RolloutRequest(rollout.samples, rollout.temperature, rollout.top_p, rollout.max_tokens, seed, source)
        # A part that is made again calls again only for what dead replicas had, or none has taken.
        before, refs = issued.get(index, []), list[ray.ObjectRef]()
        issued[index] = refs
        for i, first in enumerate(rows[::together]):
            if i < len(before) and not is_lost(before[i]):
                refs.append(before[i])
            else:
                refs.append(as_ref(handle.generate.remote(block, rows[first : first + together], request)))
        if len(issued) > 2 * parts_at_once:
            del issued[next(iter(issued))]  # complete for long; its completions need not stay in memory
        return collect.remote(place, *refs)

    return run_stage(out, parts_at_once, len(prompts), start)


def _begun_with(completions: pa.Table) -> Counter[int]:
    return Counter(completions["first_version"].to_pylist())


def age(completions: Sequence[Part], version: int) -> Age:
    """How many steps before `version` the weights were that completions were begun with."""
    begun = sum(of_each(completions, tasks_at_once(), _begun_with), Counter[int]())
    mean = sum((version - first) * n for first, n in begun.items()) / begun.total()
    return Age(mean=mean, most=version - min(begun))


def score(rewards: "DeploymentHandle", completions: Sequence[Part], out: StageOutput, window: int) -> list[Part]:
    """SCORES for each part of completions."""

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        return collect.remote(place, as_ref(rewards.score.remote(completions[index].argument(again))))

    return run_stage(out, window, len(completions), start)


def judged(scores: Sequence[Part]) -> Tally:
    """What the rewards of judges took."""
    return sum(of_each(scores, tasks_at_once(), tally_of), Tally())


def length_fit(scores: Sequence[Part]) -> LengthFit | None:
    """How rewards go with length over all parts."""
    return fit(sum(of_each(scores, tasks_at_once(), moments_of), Moments()))


@ray.remote(num_cpus=0.1)
def _pair(out: Place, scores: pa.Table, found: LengthFit | None) -> pa.Table:
    pairs, counts = best_against_worst(without_length(scores, found) if found else scores)
    pairs = pairs.replace_schema_metadata({f"dropped:{reason}": str(n) for reason, n in counts.items()})
    out.write_table(pairs)
    return pairs


def _dropped(pairs: pa.Table) -> Counter[str]:
    counts = {key: int(n) for key, n in (pairs.schema.metadata or {}).items() if key.startswith(b"dropped:")}
    return Counter({key.decode().removeprefix("dropped:"): n for key, n in counts.items()})


def pair(scores: Sequence[Part], out: StageOutput, found: LengthFit | None = None) -> list[Part]:
    """Best against worst for each part of scores, of rewards that are corrected for length by what was `found`."""

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        return _pair.remote(place, scores[index].argument(again), found)

    return run_stage(out, PAIRINGS_AT_ONCE, len(scores), start)


def dropped(candidates: Sequence[Part]) -> Counter[str]:
    """How many prompts gave no pair, by reason."""
    return sum(of_each(candidates, tasks_at_once(), _dropped), Counter())


def reference(
    references: "DeploymentHandle",
    pairs: Sequence[Part],
    out: StageOutput,
    weights: tuple[str, int],
    versions: Place,
    config: RunConfig,
    round: int,
) -> list[Part]:
    """Each part of a round's pairs with the token log-probs of (run, version) `weights` as reference. The ranks read
    their files, so that a round does not lie in the object store while it trains."""

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        block = pairs[index].argument(again)
        return as_ref(references.score.remote(block, *weights, versions.url, config, round, place.url))

    return run_stage(out, capacity(config.fleet.references), len(pairs), start, keep=False)


def _lengths(pairs: pa.Table) -> Lengths:
    sides = [pc.list_value_length(pairs[name]).to_numpy() for name in ("prompt", "chosen", "rejected")]
    return np.stack(sides, axis=1).astype(np.int32)


def lengths(pairs: Sequence[Part]) -> Lengths:
    """[pairs, 3] token counts: all that the driver sees of a round's pairs."""
    return np.concatenate(of_each(pairs, tasks_at_once(), _lengths))


def as_ref(response: "DeploymentResponse") -> ray.ObjectRef:
    """A Serve call's result as an object reference of this process, to pass on without fetching it. NotTakenError when
    its replicas' queues are full; StageError when none takes it in time."""
    from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError  # takes seconds, as ray.serve does

    from sampo_ray.internals.serve import result_ref

    try:
        return result_ref(response, ASSIGN_S)
    except (BackPressureError, ReplicaUnavailableError) as error:
        raise NotTakenError(str(error)) from None
    except TimeoutError:
        raise StageError(f"no replica took a call within {ASSIGN_S:.0f} s; check the engines in Ray's logs") from None


def capacity(fleet: FleetConfig) -> int:
    """How many calls a fleet works on at once when all its replicas run."""
    return (fleet.max_replicas or 1) * fleet.max_ongoing_requests
