"""Reference workers: the trainer's forward, without gradients, over the same rows; a log-prob a token."""

import logging
import threading
import time

import pyarrow as pa
import ray
import torch
from ray import serve

from sampo_ray.actors.weights.client import fetch, find_weight_store
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import FleetConfig
from sampo_ray.data.preferences import pairs_of, with_reference
from sampo_ray.run.buckets import unpack
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import WeightsId
from sampo_ray.training.objective import reference_positions
from sampo_ray.training.policy import Policy, load_policy, score_pairs

logger = logging.getLogger(__name__)

WEIGHTS_S = 300.0
"""For the store to load a version, and for each of its buckets to arrive."""


class ReferenceWorker:
    """Serve replica that scores pairs with the version that each call names; it keeps the last one loaded."""

    def __init__(self, store: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._store = find_weight_store(store)
        self._computing = threading.Lock()  # Serve runs calls in threads, and each may load another version
        self._loaded: WeightsId | None = None
        self._policy: Policy | None = None

    def score(
        self, pairs: pa.Table, run: str, version: int, versions_url: str, config: RunConfig, round: int, out: str
    ) -> pa.Table:
        """Scores a PAIRS block of a round with `version` of `run`; writes and returns a REFERENCE block."""
        with self._computing:
            policy = self._load(WeightsId(run, version), versions_url, config.model.flex)
            select = reference_positions(config, round)
            scored = with_reference(pairs, score_pairs(policy, pairs_of(pairs), config.row_budget, select))
        Place(out).write_table(scored)
        return scored

    def _load(self, wanted: WeightsId, versions_url: str, flex: bool) -> Policy:
        if self._loaded == wanted and self._policy is not None:
            return self._policy
        started = time.monotonic()
        if self._policy is None or self._loaded is None or self._loaded.run != wanted.run:
            with Place(versions_url).at("000000").on_disk() as base:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self._policy = load_policy(base, device=device, flex=flex).eval().requires_grad_(False)
        self._loaded = None
        weights = ray.get(self._store.get.remote(wanted.run, wanted.version), timeout=WEIGHTS_S)
        parameters = dict(self._policy.model.named_parameters())
        for bucket in weights.buckets:
            for name, tensor in unpack(fetch(bucket, WEIGHTS_S)):
                parameters[name].copy_(tensor)
        self._loaded = wanted
        logger.info("reference %s loaded in %.2f s", wanted, time.monotonic() - started)
        return self._policy


def build_reference_app(store: str, fleet: FleetConfig, threads: int | None) -> serve.Application:
    """The reference workers as a Serve application; they load nothing before the first call."""
    deployment = serve.deployment(
        ReferenceWorker,
        name="references",
        max_ongoing_requests=fleet.max_ongoing_requests,
        max_queued_requests=fleet.max_queued_requests,
        autoscaling_config=fleet.autoscaling,
        ray_actor_options={
            "num_cpus": fleet.num_cpus if fleet.num_cpus is not None else 0.5,
            "num_gpus": fleet.num_gpus or 0,
        },
        health_check_timeout_s=120,
    )
    return deployment.bind(store, threads)
