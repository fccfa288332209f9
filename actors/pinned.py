"""Pinned versions: each a Serve application of its own that scales from zero, so that `policy` is never redeployed."""

from collections.abc import Sequence

import ray
from ray import serve

from sampo_ray.actors.weights import WeightsId, version_folder
from sampo_ray.runs import Place, open_run


class Pinned:
    """Brings the applications of pinned versions in line with what is asked for, in the background and in order."""

    def __init__(self, apps: str, store: str) -> None:
        self._apps, self._store = apps, store
        self._wanted: tuple[str, tuple[int, ...]] | None = None
        self._last: ray.ObjectRef | None = None

    def become(self, place: Place, run_id: str, versions: Sequence[int]) -> None:
        wanted = run_id, tuple(versions)
        if self._apps and wanted != self._wanted and (versions or self._wanted):
            self._wanted = wanted
            self._last = _reconcile.remote(self._apps, self._store, place, run_id, list(versions), self._last)


def pinned_app(apps: str, version: int) -> str:
    """The name of the Serve application of a pinned version, in the fleet of that prefix."""
    return f"{pinned_prefix(apps)}{version}"


def pinned_prefix(apps: str) -> str:
    return f"{apps}-pinned-"


def delete_pinned(apps: str, keep: Sequence[str] = ()) -> None:
    for name in serve.status().applications:
        if name.startswith(pinned_prefix(apps)) and name not in keep:
            serve.delete(name)


@ray.remote(num_cpus=0.1, max_retries=2)
def _reconcile(apps: str, store: str, place: Place, run_id: str, versions: list[int], _before: None) -> None:
    from sampo_ray.actors.policy_server import Source, policy_deployment  # brings vLLM in

    names = {pinned_app(apps, version): version for version in versions}
    delete_pinned(apps, keep=list(names))
    config = open_run(place.url).config
    settings = config.fleet.generators.model_copy(update={"min_replicas": 0, "max_replicas": 1})
    running = serve.status().applications
    targets = []
    for name, version in names.items():
        if name not in running:
            app = policy_deployment(
                f"policy@{version}",
                version_folder(place.at("versions").url, version),
                place.at("tokenizer").url,
                Source(store, pinned=WeightsId(run_id, version), drain_s=config.serve.request_timeout_s),
                settings,
                config.data.max_length,
            )
            targets.append(serve.RunTarget(app, name=name, route_prefix=None))
    if targets:
        serve.run_many(targets, wait_for_applications_running=False)
