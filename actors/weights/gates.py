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
from sampo_ray.errors import WeightsNotLoadedError
from sampo_ray.internals.serve import app_handle
from sampo_ray.run.buckets import unpack
from sampo_ray.run.directory import open_run
from sampo_ray.run.manifest import read_manifest
from sampo_ray.run.parts import parts_of
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import WeightsId, version_folder

CALL_SECONDS = 900.0
"""A generator may have to start first."""


@dataclass(frozen=True)
class Probe:
    """A version's greedy answers to the probe prompts, one entry a prompt: tokens, whether it ended by itself, reward
    (empty without a reward source)."""

    tokens: Sequence[int]
    finished: Sequence[bool]
    rewards: Sequence[float | None] = ()


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
    return Verdict(True)


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Share of prompts with the higher reward, ties half; None where no prompt has both rewards."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return fmean(0.5 if a == b else float(a > b) for a, b in both) if both else None


@ray.remote(num_cpus=0.1)
def check(apps: str, place: Place, run_id: str, version: int, before: int | None) -> Verdict | None:
    """Probes a version through the fleet's generators, keeps the probe in `probes/`, and judges it; None when training
    has moved on, so that no generator holds the version any more."""
    config = open_run(place.url).config
    gates = config.serve.gates
    if gates.finite and not _is_finite(place, version):
        return Verdict(False, "its weights are not all finite numbers")
    if not gates.probing:
        return Verdict(True)
    try:
        if gates.smoke is not None and not _answers(apps, place, config, (run_id, version), gates.smoke):
            return Verdict(False, "it gave no finished answer to the prompt serve.gates.smoke")
        last = None
        if before is not None:
            kept = _probe_file(place, before)
            last = Probe(**json.loads(kept.read())) if kept.exists() else None
        probe = _probe(apps, place, config, (run_id, version))
    except WeightsNotLoadedError:
        return None
    _probe_file(place, version).write(json.dumps(asdict(probe)).encode())
    return judge(gates, probe, last)


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
    parts = parts_of(place.at("data"), read_manifest(place).data.rows)
    block = next(part for part in parts if part.rows).table().slice(0, config.serve.gates.probes)
    done = _generate(apps, config, block, weights)
    rewards: list[float | None] = []
    if config.serve.gates.min_win_rate is not None:
        scored = app_handle(f"{apps}-rewards").score.remote(done).result(timeout_s=CALL_SECONDS)
        rewards = scored["reward"].to_pylist()
    finished = [reason == "stop" for reason in done["finish_reason"].to_pylist()]
    return Probe([len(ids) for ids in done["completion"].to_pylist()], finished, rewards)


def _generate(apps: str, config: RunConfig, block: pa.Table, weights: tuple[str, int]) -> pa.Table:
    room = config.data.max_length - max(len(ids) for ids in block["prompt"].to_pylist())
    tokens = max(1, min(config.rollout.max_tokens, room))
    request = RolloutRequest(1, 0.0, 1.0, tokens, seed=0, weights=WeightsId(*weights))
    generate = app_handle(f"{apps}-generators").generate
    return generate.remote(block, range(len(block)), request).result(timeout_s=CALL_SECONDS)


def _probe_file(place: Place, version: int) -> Place:
    return place.at("probes", f"{version:06d}.json")
