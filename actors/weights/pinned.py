"""Pinned versions: each is a Serve application that scales from zero, so that `policy` is never redeployed."""

import asyncio
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from sampo_ray.actors.weights.duty import Duty, result_within
from sampo_ray.errors import FleetError
from sampo_ray.internals.serve import begin_delete, delete_app, deploy, serve_status
from sampo_ray.run.directory import open_run
from sampo_ray.run.report import PinName, PinState
from sampo_ray.run.serving import Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId, is_version_number, version_folder

RANKS = (16, 64, 256, 512)
"""Adapters on a version share an application with those up to the same of these ranks. vLLM must be told the largest
when it starts and computes with it, so that one application for all would have to start again for a larger rank.
"""
LOOK_S = 10.0
STATUS_S, CARRY_OUT_S = 30.0, 600.0
"""Limits: of a look at what Serve runs, and of the task that starts and removes applications."""

Pin = tuple[int, int]
"""What an application serves: a version, and adapters on it up to this rank (0: none)."""


@dataclass(frozen=True)
class Pins:
    """What is pinned of a run, see `pins_of`."""

    place: Place
    run: str
    pins: Mapping[PinName, Pin]

    def named(self, apps: str) -> dict[str, Pin]:
        return {pinned_app(apps, self.run, pin): pin for pin in self.pins.values()}


class PinnedApps:
    """Keeps the applications of pinned versions as they are wanted: looks at what Serve runs, and starts what is
    missing, removes what is too much, and starts again what has failed."""

    def __init__(self, apps: str) -> None:
        self.apps = apps
        self.duty = Duty("pinned versions", self._reconcile, LOOK_S)
        self._wanted: Pins | None = None  # not known yet
        self._seen = dict[str, PinState]()
        self._failed: Collection[str] = ()
        self._unproven = dict[str, str]()
        """Applications that were started again, with the reason: none of their replicas has run since."""
        self._thread = ThreadPoolExecutor(1, "serve-status")

    def want(self, place: Place, run_id: str, state: Serving) -> None:
        wanted = Pins(place, run_id, pins_of(state))
        if wanted != self._wanted:
            self._wanted = wanted
            self.duty.wake()

    @property
    def states(self) -> dict[PinName, PinState]:
        """The state of what is pinned, by version number or adapter's name; none without a fleet."""
        trouble, states, wanted = self.duty.trouble, dict[PinName, PinState](), self._wanted
        if not self.apps or wanted is None:
            return states
        for name, pin in wanted.pins.items():
            seen = self._seen.get(pinned_app(self.apps, wanted.run, pin), PinState(state="starting"))
            if seen.state == "starting" and trouble is not None:
                seen = PinState(state="failing", reason=trouble.reason)
            states[name] = seen
        return states

    async def _reconcile(self) -> bool:
        wanted = self._wanted
        if not self.apps or wanted is None:
            return True
        names = wanted.named(self.apps)
        looking = asyncio.get_running_loop().run_in_executor(self._thread, _applications, f"{self.apps}-pinned-")
        found = await asyncio.wait_for(looking, STATUS_S)
        seen = self._note(names, found)
        start, remove = difference(names, found, self._failed)
        if start or remove:
            self._unproven |= {name: seen[name].reason or "" for name in start if seen[name].state == "failing"}
            self._failed = ()
            missing = {name: names[name] for name in start}
            await result_within(_carry_out.remote(wanted.place, wanted.run, missing, remove), CARRY_OUT_S)
            return False
        self._failed = [name for name, pin in seen.items() if pin.state == "failing"]
        if self._failed:
            each = (f"version {names[name][0]} does not start: {seen[name].reason}" for name in self._failed)
            raise FleetError("; ".join(each))
        return all(pin.state == "pinned" for pin in seen.values())

    def _note(self, names: Collection[str], found: Mapping[str, ApplicationStatusOverview]) -> Mapping[str, PinState]:
        """What Serve says of the applications; those that failed before count as starting until a replica runs."""
        seen = {name: pin_state(found.get(name)) for name in names}
        left = {name for name in self._unproven if name in names and not has_replica(found.get(name))}
        self._unproven = {name: reason for name, reason in self._unproven.items() if name in left}
        self._seen = dict(seen)
        for name, reason in self._unproven.items():
            if seen[name].state == "pinned":
                self._seen[name] = PinState(state="starting", reason=f"it did not start before: {reason}")
        return seen


def pin_state(app: ApplicationStatusOverview | None) -> PinState:
    """How far an application is, as Serve says it."""
    if app is None or app.status in (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING):
        return PinState(state="starting")
    if has_replica(app) or app.status == ApplicationStatus.RUNNING:
        return PinState(state="pinned")
    if app.status == ApplicationStatus.DEPLOYING:
        return PinState(state="starting")
    messages = (app.message, *(deployment.message for deployment in app.deployments.values()))
    return PinState(state="failing", reason=last_error("\n".join(messages)))


def has_replica(app: ApplicationStatusOverview | None) -> bool:
    """Whether a replica runs."""
    return app is not None and any(each.replica_states.get("RUNNING") for each in app.deployments.values())


def difference(
    wanted: Collection[str], found: Mapping[str, ApplicationStatusOverview], again: Collection[str]
) -> tuple[list[str], list[str]]:
    """The applications to start and to remove, the latter first. Those that fail are in both if they are `again` found
    so: after three failures in a row Serve starts no replica of theirs any more. One that is being deleted is waited
    for."""
    failing = {name for name in again if name in wanted and pin_state(found.get(name)).state == "failing"}
    too_much = {name for name in found if name not in wanted and found[name].status != ApplicationStatus.DELETING}
    missing = {name for name in wanted if name not in found}
    return sorted(missing | failing), sorted(too_much | failing)


def _applications(prefix: str) -> dict[str, ApplicationStatusOverview]:
    return {name: app for name, app in serve_status(STATUS_S).applications.items() if name.startswith(prefix)}


def pins_of(state: Serving) -> dict[PinName, Pin]:
    """What is pinned, by version number or adapter's name, and the application that answers for it.

    A version that was pinned itself has an application of its own. One that is pinned for its adapters shares the
    oldest one's. So no adapter that comes moves anything else to another application, which would have to start.
    """
    adapters = dict[PinName, Pin]()
    for name, adapter in state.adapters.items():
        rank = next(rank for rank in RANKS if adapter.rank <= rank)
        adapters[int(name) if is_version_number(name) else name] = adapter.base, rank
    versions = dict[PinName, Pin]()
    for pin in adapters.values():
        versions.setdefault(pin[0], pin)
    return {**adapters, **versions, **{version: (version, 0) for version in state.pinned}}


def pinned_app(apps: str, run_id: str, pin: Pin) -> str:
    """The name of a pin's Serve application; it names the run, since a fleet may serve one after another."""
    version, rank = pin
    return f"{apps}-pinned-{run_id}-{version}" + (f"-lora{rank}" if rank else "")


def delete_pinned(apps: str) -> None:
    delete_apps([name for name in serve_status().applications if name.startswith(f"{apps}-pinned-")])


def delete_apps(names: Sequence[str]) -> None:
    """Deletes Serve applications, all at the same time, and waits until they are gone."""
    for name in names:
        begin_delete(name)
    for name in names:
        delete_app(name)


def last_error(report: str) -> str:
    """The last error in Serve's report on an application that could not start."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    last = lines[errors[-1] :] if errors else lines[-1:] or ["an application could not be started"]
    return textwrap.shorten(" ".join(line for line in last if not line.startswith("For further information")), 500)


@ray.remote(num_cpus=0.1, max_retries=0)
def _carry_out(place: Place, run_id: str, start: Mapping[str, Pin], remove: Sequence[str]) -> None:
    """Removes applications, then starts others. It is tried again by those who call it."""
    delete_apps(remove)
    if not start:
        return
    from sampo_ray.actors.policy.deployment import policy_deployment, with_tools
    from sampo_ray.actors.policy.replica_weights import WeightsSource  # imports vLLM

    config = open_run(place.url).config
    settings = config.fleet.generators.model_copy(update={"min_replicas": 0, "max_replicas": 1})
    settings = with_tools(settings, config.serve.tools, place.at("tokenizer"))
    tokenizer, drain_s = place.at("tokenizer").url, config.serve.request_timeout_s
    targets = []
    for name, (version, rank) in start.items():
        adapters, folder = place.url if rank else None, version_folder(place.at("versions").url, version)
        source = WeightsSource(pinned=WeightsId(run_id, version), drain_s=drain_s, adapters=adapters, max_rank=rank)
        app = policy_deployment(f"policy@{version}", folder, tokenizer, source, settings, config.data.max_length)
        targets.append(serve.RunTarget(app, name=name, route_prefix=None))
    deploy(targets)
