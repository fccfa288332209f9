"""Pinned versions: each a Serve application of its own that scales from zero, so that `policy` is never redeployed."""

from collections.abc import Mapping, Sequence

import ray
from ray import serve

from sampo_ray.run.directory import open_run
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import WeightsId, version_folder
from sampo_ray.run.versions import Serving, adapters_on

RANKS = (0, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be told to expect; 0: no adapters."""


class Pinned:
    """Brings the applications of pinned versions in line with what is asked for, in the background and in order."""

    def __init__(self, apps: str) -> None:
        self._apps = apps
        self._wanted: tuple[str, dict[int, int]] | None = None
        self._last: ray.ObjectRef | None = None

    def become(self, place: Place, run_id: str, ranks: Mapping[int, int]) -> None:
        """`ranks`: the versions to serve, and the largest rank of the adapters on each (0: none)."""
        wanted = run_id, dict(ranks)
        if self._apps and wanted != self._wanted and (ranks or self._wanted):
            self._wanted = wanted
            self._last = _reconcile.remote(self._apps, place, run_id, dict(ranks), self._last)


def adapter_ranks(state: Serving) -> dict[int, int]:
    """The pinned versions, and for each the smallest rank that vLLM knows and all adapters on it fit in (0: none)."""
    largest = {v: max((a.rank for a in adapters_on(state, v).values()), default=0) for v in state.pinned}
    return {version: min((r for r in RANKS if r >= rank), default=RANKS[-1]) for version, rank in largest.items()}


def adapter_place(run: Place, name: str) -> Place:
    """The folder of an adapter in a run directory: a user's by its name, a version of adapters alone by its number."""
    return Place(version_folder(run.at("versions").url, int(name))) if name.isdecimal() else run.at("adapters", name)


def pinned_app(apps: str, run_id: str, version: int, rank: int) -> str:
    """The name of the Serve application of a run's pinned version, in the fleet of that prefix, which may see several
    runs: the last one's application may still be there.
    """
    return f"{pinned_prefix(apps)}{run_id}-{version}" + (f"-lora{rank}" if rank else "")


def pinned_prefix(apps: str) -> str:
    return f"{apps}-pinned-"


def delete_pinned(apps: str, keep: Sequence[str] = ()) -> None:
    running = serve.status().applications
    delete_apps([name for name in running if name.startswith(pinned_prefix(apps)) and name not in keep])


def delete_apps(names: Sequence[str]) -> None:
    """Takes Serve applications down, all at the same time, and waits until they are."""
    for name in names:
        serve.delete(name, _blocking=False)
    for name in names:
        serve.delete(name)


@ray.remote(num_cpus=0.1, max_retries=2)
def _reconcile(apps: str, place: Place, run_id: str, ranks: dict[int, int], _before: None) -> None:
    from sampo_ray.actors.policy.deployment import policy_deployment
    from sampo_ray.actors.policy.server import Source  # brings vLLM in

    names = {pinned_app(apps, run_id, version, rank): (version, rank) for version, rank in ranks.items()}
    delete_pinned(apps, keep=list(names))
    config = open_run(place.url).config
    settings = config.fleet.generators.model_copy(update={"min_replicas": 0, "max_replicas": 1})
    running = serve.status().applications
    targets = []
    for name, (version, rank) in names.items():
        if name not in running:
            source = Source(
                pinned=WeightsId(run_id, version),
                drain_s=config.serve.request_timeout_s,
                adapters=place.url if rank else None,
                max_rank=rank,
            )
            app = policy_deployment(
                f"policy@{version}",
                version_folder(place.at("versions").url, version),
                place.at("tokenizer").url,
                source,
                settings,
                config.data.max_length,
            )
            targets.append(serve.RunTarget(app, name=name, route_prefix=None))
    if targets:
        serve.run_many(targets, wait_for_applications_running=False)
