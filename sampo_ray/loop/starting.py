"""Starting the Serve applications of a fleet: all at once, followed until they run, or until that is given up."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ServeStatus

from sampo_ray.actors.nodes import Where
from sampo_ray.actors.waiting import POLL_S, Need, Wait
from sampo_ray.actors.weights.pinned import last_error
from sampo_ray.actors.weights.store import STORE_CPUS
from sampo_ray.config.machines import Cluster
from sampo_ray.config.packing import Role
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.config.sizing import groups_of
from sampo_ray.errors import FleetError
from sampo_ray.internals.serve import bundles_of, deploy, serve_status

LOADING_S = 3600.0
"""For engines to load their models, once they have their nodes."""
SETTINGS = {
    "policy": "fleet.generators.num_gpus",
    "generators": "fleet.generators.min_replicas",
    "references": "fleet.references.min_replicas",
    "rewards": "fleet.rewards.min_replicas",
}
"""By the ends of applications' names: what is made smaller where nodes are missing."""


class Places:
    """Where the actors of a run go, whose sizes are filled in, on the cluster as it was when it started."""

    def __init__(self, config: RunConfig, cluster: Cluster) -> None:
        self._groups, self._cluster = {group.role: group for group in groups_of(config)}, cluster

    def of(self, role: Role, bytes: int = 0) -> Where:
        """Where actors of a role run; each takes `bytes` of memory more than the plan knows."""
        where = Where.of(self._groups.get(role), self._cluster)
        return replace(where, memory=where.memory + bytes) if where.memory else where

    @property
    def store(self) -> Need:
        """What the weight store asks Ray for."""
        where = self.of("store")
        asked = {"CPU": STORE_CPUS, **{name: float(amount) for name, amount in where.memory_option.items()}}
        return Need("weight store", (asked,), avoids_head=bool(where.labels))

    def sized(self, role: Literal["policy", "generators"], settings: GeneratorsConfig) -> GeneratorsConfig:
        """The settings with as many replicas as the plan has for the role."""
        group = self._groups[role]
        return settings.model_copy(update={"min_replicas": group.least, "max_replicas": group.most})


def needs_of(apps: Mapping[str, serve.Application]) -> list[Need]:
    """What a replica of each application asks Ray for."""
    roles = {name: name.rpartition("-")[2] for name in apps}
    return [Need(role, bundles_of(apps[name]), SETTINGS[role]) for name, role in roles.items()]


def run_apps(apps: Mapping[str, serve.Application], wait: Wait) -> dict[str, DeploymentHandle]:
    """Deploys applications, none of which is reached by a route of its own."""
    if not apps:
        return {}  # an offline run without a reference, or whose reference only its trainer needs
    targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
    handles = deploy(targets)
    await_apps(list(apps), wait)
    return dict(zip(apps, handles, strict=True))


def await_apps(names: list[str], wait: Wait) -> None:
    """Returns once all of these applications run. FleetError when one of them fails, is taken down, lacks nodes for too
    long, or does not get ready within LOADING_S from when none lacked any."""
    since = time.monotonic()
    while starting := _starting(serve_status(), names):
        if wait.look():
            since = time.monotonic()
        elif time.monotonic() - since > LOADING_S:
            raise FleetError(
                f"{', '.join(starting)} did not get ready within {LOADING_S:.0f} s, though Ray lacks nothing; look at "
                "the replicas' logs"
            )
        time.sleep(POLL_S)


def _starting(status: ServeStatus, names: list[str]) -> list[str]:
    """The applications that do not run yet."""
    starting = []
    for name in names:
        if (app := status.applications.get(name)) is None:
            raise FleetError(f"{name} was taken down while it started")
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            # A deployment's traceback holds more than its application's error.
            all_of = [
                deployment
                for each in names
                if each in status.applications
                for deployment in status.applications[each].deployments.values()
            ]
            traces = "".join(f"\n{each.message}" for each in all_of if each.status != "HEALTHY" and each.message)
            raise FleetError(f"{last_error(f'{app.message}{traces}')} (Ray's logs have the rest)")
        if app.status != ApplicationStatus.RUNNING:
            starting.append(name)
    return starting
