"""Checks that a version must pass before it goes live: a probe of its answers, judged by what the recipe asks for."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import pyarrow as pa
import ray
import torch

from sampo_ray.actors.policy.messages import RolloutRequest
from sampo_ray.config.run import RunConfig
from sampo_ray.config.serving import GatesConfig
from sampo_ray.errors import WeightsError, WeightsNotLoadedError
from sampo_ray.evaluation.verifiers import followed_in
from sampo_ray.internals.serve import app_handle
from sampo_ray.run.buckets import unpack
from sampo_ray.run.directory import open_run
from sampo_ray.run.manifest import Manifest, read_manifest
from sampo_ray.run.parts import parts_of
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import WeightsId, version_folder

CALL_SECONDS = 900.0
"""A generator may have to start first."""
PARTS_SEARCHED = 32
"""For prompts with verifiable instructions."""


@dataclass(frozen=True)
class Probe:
    """A version's greedy answers to the probe prompts, one entry a prompt: tokens, whether it ended by itself, reward
    (empty where no gate asks for it)."""

    tokens: Sequence[int]
    finished: Sequence[bool]
    rewards: Sequence[float | None] = ()
    followed: Sequence[bool] = ()
    """All verifiable instructions of all prompts."""


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str = ""


def judge(gates: GatesConfig, probe: Probe, before: Probe | None) -> Verdict:
    """Whether a version may go live. `before` is the probe of the last version that passed, on the same prompts."""
    mean = fmean(probe.tokens)
    if gates.max_mean_tokens is not None and mean > gates.max_mean_tokens:
        return Verdict(False, f"mean answer of {mean:.1f} tokens is above max_mean_tokens={gates.max_mean_tokens:g}")
    if before is None:
        return Verdict(True)
    allowed = None if gates.max_growth is None else gates.max_growth * fmean(before.tokens)
    if allowed is not None and mean > allowed:
        above = f"mean answer of {mean:.1f} tokens is above the {allowed:.1f} of max_growth={gates.max_growth:g}"
        return Verdict(False, above)
    if gates.min_win_rate is not None:
        rate = win_rate(probe.rewards, before.rewards)
        if rate is not None and rate < gates.min_win_rate:
            return Verdict(False, f"win rate of {rate:.3f} on the probe is below min_win_rate={gates.min_win_rate:g}")
    if gates.verifiers is not None and probe.followed and before.followed:
        now, then = fmean(probe.followed), fmean(before.followed)
        if now < then - gates.verifiers:
            fell = f"share of instructions followed fell from {then:.3f} to {now:.3f}"
            return Verdict(False, f"{fell}, by more than verifiers={gates.verifiers:g}")
    return Verdict(True)


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Share of prompts with the higher reward, ties half; None where no prompt has both rewards."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return fmean(0.5 if a == b else float(a > b) for a, b in both) if both else None


@ray.remote(num_cpus=0.1)
def check(apps: str, place: Place, run_id: str, version: int, before: int | None) -> Verdict | None:
    """Probes a version through the fleet's generators, keeps the probe in `probes/`, and judges it; None when training
    has moved on, so that no generator holds the version any more, or the run has not evaluated it yet."""
    config = open_run(place.url).config
    gates = config.serve.gates
    if gates.finite and not _is_finite(place, version):
        return Verdict(False, "its weights are not all finite numbers")
    if gates.probe and (evaluated := evaluation_of(read_manifest(place), version)) != Verdict(True):
        return evaluated
    if not gates.probing:
        return Verdict(True)
    try:
        if gates.smoke is not None and not _answers(apps, place, config, (run_id, version), gates.smoke):
            return Verdict(False, "it gave no finished answer to the prompt serve.gates.smoke")
        probe = _probe(apps, place, config, (run_id, version))
    except WeightsNotLoadedError:
        return None
    _probe_file(place, version).write(json.dumps(asdict(probe)).encode())
    kept = None if before is None else _probe_file(place, before)
    return judge(gates, probe, Probe(**json.loads(kept.read())) if kept is not None and kept.exists() else None)


def evaluation_of(manifest: Manifest, version: int) -> Verdict | None:
    """What the evaluation at the end of a version's round says of it; None where there is none, or none yet."""
    ended = next((each for each in manifest.rounds if each.steps and each.end_version == version), None)
    if ended is None or ended.probed is None:
        return None
    return Verdict(ended.probed.collapsed is None, ended.probed.collapsed or "")


def _is_finite(place: Place, version: int) -> bool:
    folder = version_folder(place.at("versions").url, version)
    return all(bool(torch.isfinite(t).all()) for bucket in read_version(folder) for _, t in unpack(bucket))


def _answers(apps: str, place: Place, config: RunConfig, weights: tuple[str, int], prompt: str) -> bool:
    """Whether a version ends an answer to `prompt` by itself, and says something."""
    from sampo_ray.data.chat import ChatFormat

    with place.at("tokenizer").on_disk() as folder:
        ids = ChatFormat.load(folder, "tokenizer").prompt_ids([{"role": "user", "content": prompt}])
    block = pa.table({"id": ["smoke"], "prompt": pa.array([list(ids)], pa.list_(pa.int32()))})
    (row,) = _generate(apps, config, block, weights).to_pylist()
    return row["finish_reason"] == "stop" and bool(row["text"].strip())


def _probe(apps: str, place: Place, config: RunConfig, weights: tuple[str, int]) -> Probe:
    done = _generate(apps, config, _prompts(place, config), weights)
    gates, rewards = config.serve.gates, list[float | None]()
    if gates.min_win_rate is not None:
        scored = app_handle(f"{apps}-rewards").score.remote(done).result(timeout_s=CALL_SECONDS)
        rewards = scored["reward"].to_pylist()
    follows = followed_in(done) if gates.verifiers is not None else []
    finished = [reason == "stop" for reason in done["finish_reason"].to_pylist()]
    tokens = [len(ids) for ids in done["completion"].to_pylist()]
    return Probe(tokens, finished, rewards, [each for one in follows for each in one or ()])


def _prompts(place: Place, config: RunConfig) -> pa.Table:
    """Those that the run holds out for its evaluation, else the first of its data; where instructions are verified,
    the first that have some."""
    data, gates = read_manifest(place).data, config.serve.gates
    parts = parts_of(place.at("held-out", "prompts"), data.probe) or parts_of(place.at("data"), data.rows)
    if gates.verifiers is None:
        return next(part for part in parts if part.rows).table().slice(0, gates.probes)
    found: list[pa.Table] = []
    for part in parts[:PARTS_SEARCHED]:
        table = part.table()
        found.append(
            table.filter(pa.array(["instruction_id_list" in json.loads(row) for row in table["columns"].to_pylist()]))
        )
        if sum(each.num_rows for each in found) >= gates.probes:
            break
    return pa.concat_tables(found).slice(0, gates.probes)


def _generate(apps: str, config: RunConfig, block: pa.Table, weights: tuple[str, int]) -> pa.Table:
    if not len(block):
        raise WeightsError("no prompt of the run has verifiable instructions, as serve.gates.verifiers needs them")
    room = config.data.max_length - max(len(ids) for ids in block["prompt"].to_pylist())
    tokens = max(1, min(config.rollout.max_tokens, room))
    request = RolloutRequest(1, 0.0, 1.0, tokens, seed=0, weights=WeightsId(*weights))
    generate = app_handle(f"{apps}-generators").generate
    return generate.remote(block, range(len(block)), request).result(timeout_s=CALL_SECONDS)


def _probe_file(place: Place, version: int) -> Place:
    return place.at("probes", f"{version:06d}.json")
