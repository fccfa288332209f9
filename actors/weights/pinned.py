"""Pinned versions: each is a Serve application that scales from zero, so that `policy` is never redeployed."""

from collections.abc import Sequence

import ray
from ray import serve

from sampo_ray.internals.serve import begin_delete
from sampo_ray.run.directory import open_run
from sampo_ray.run.serving import Serving, adapters_on
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId, version_folder

RANKS = (0, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be told to expect; 0: no adapters."""


class PinnedApps:
    """Starts and stops the applications of pinned versions in the background, one change after the other."""

    def __init__(self, apps: str) -> None:
        self.apps = apps
        self._wanted: tuple[str, dict[int, int]] = "", {}
        self._last: ray.ObjectRef | None = None

    def serve(self, place: Place, run_id: str, state: Serving) -> None:
        """Brings the applications in line with what is pinned."""
        ranks = adapter_ranks(state)
        if self.apps and (run_id, ranks) != self._wanted and (ranks or self._wanted[0]):
            self._wanted = run_id, ranks
            self._last = _reconcile.remote(self.apps, place, run_id, ranks, self._last)


def adapter_ranks(state: Serving) -> dict[int, int]:
    """The pinned versions, each with the smallest rank that vLLM knows and all adapters on it fit in (0: none)."""
    largest = {v: max((a.rank for a in adapters_on(state, v).values()), default=0) for v in state.pinned}
    return {version: min((r for r in RANKS if r >= rank), default=RANKS[-1]) for version, rank in largest.items()}


def pinned_app(apps: str, run_id: str, version: int, rank: int) -> str:
    """The name of a pinned version's Serve application; it names the run, since a fleet may serve one after another."""
    return f"{apps}-pinned-{run_id}-{version}" + (f"-lora{rank}" if rank else "")


def delete_pinned(apps: str, keep: Sequence[str] = ()) -> None:
    running = serve.status().applications
    delete_apps([name for name in running if name.startswith(f"{apps}-pinned-") and name not in keep])


def delete_apps(names: Sequence[str]) -> None:
    """Deletes Serve applications, all at the same time, and waits until they are gone."""
    for name in names:
        begin_delete(name)
    for name in names:
        serve.delete(name)


@ray.remote(num_cpus=0.1, max_retries=2)
def _reconcile(apps: str, place: Place, run_id: str, ranks: dict[int, int], _before: None) -> None:
    from sampo_ray.actors.policy.deployment import policy_deployment
    from sampo_ray.actors.policy.replica_weights import WeightsSource  # imports vLLM

    names = {pinned_app(apps, run_id, version, rank): (version, rank) for version, rank in ranks.items()}
    delete_pinned(apps, keep=list(names))
    config = open_run(place.url).config
    settings = config.fleet.generators.model_copy(update={"min_replicas": 0, "max_replicas": 1})
    tokenizer, drain_s, running = place.at("tokenizer").url, config.serve.request_timeout_s, serve.status().applications
    targets = []
    for name, (version, rank) in names.items():
        if name not in running:
            adapters, folder = place.url if rank else None, version_folder(place.at("versions").url, version)
            source = WeightsSource(pinned=WeightsId(run_id, version), drain_s=drain_s, adapters=adapters, max_rank=rank)
            app = policy_deployment(f"policy@{version}", folder, tokenizer, source, settings, config.data.max_length)
            targets.append(serve.RunTarget(app, name=name, route_prefix=None))
    if targets:
        serve.run_many(targets, wait_for_applications_running=False)
