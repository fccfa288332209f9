"""Pins: applications are started, removed and started again until they are as wanted."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from sampo_ray.actors.weights import pinned
from sampo_ray.actors.weights.client import StoreState
from sampo_ray.actors.weights.pinned import PinnedApps, difference, pin_state
from sampo_ray.config.run import load_config
from sampo_ray.errors import FleetError
from sampo_ray.run import commands
from sampo_ray.run.directory import create_run
from sampo_ray.run.report import PinState, read_reports
from sampo_ray.run.serving import Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from tests.waiting import hurry_duties, scaled, until, wait_until


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_duties(monkeypatch)
    monkeypatch.setattr(pinned, "LOOK_S", 0.05)


def app(status: str, message: str = "", running: int = 0) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status="UNHEALTHY", status_trigger="UNSPECIFIED", replica_states={"RUNNING": running}, message=message
    )
    return ApplicationStatusOverview(status, "", 0.0, {"policy": deployment})


def test_what_serve_says_of_an_application_tells_whether_its_pin_answers() -> None:
    assert pin_state(app("RUNNING")).state == "pinned"
    assert pin_state(app("UNHEALTHY", running=1)).state == "pinned"
    assert {pin_state(each).state for each in (None, app("DEPLOYING"), app("DELETING"))} == {"starting"}
    failed = pin_state(app("DEPLOY_FAILED", 'File "x"\nValueError: no room for the cache'))
    assert failed == PinState(state="failing", reason="ValueError: no room for the cache")


def test_missing_applications_are_started_surplus_ones_removed_and_failed_ones_replaced() -> None:
    found = {"up": app("RUNNING"), "bad": app("DEPLOY_FAILED"), "worse": app("UNHEALTHY"), "old": app("RUNNING")}
    found |= {"leaving": app("DELETING"), "back": app("DELETING")}
    wanted = ["up", "bad", "worse", "new", "back"]
    assert difference(wanted, found, ()) == (["new"], ["old"])
    assert difference(wanted, found, ["bad", "up", "gone"]) == (["bad", "new"], ["bad", "old"])
    assert difference(["up"], {"up": app("RUNNING")}, ()) == ([], [])


class World:
    """What Serve would run: `carry_out` fails with the next of `errors`, and applications come up as `status`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apps = dict[str, ApplicationStatusOverview]()
        self.errors, self.status, self.calls, self.running = list[Exception](), "RUNNING", 0, 0
        monkeypatch.setattr(pinned, "_applications", lambda prefix: dict(self.apps))
        monkeypatch.setattr(pinned, "_carry_out", SimpleNamespace(remote=self.carry_out))

    async def carry_out(self, place: Place, run: str, start: dict[str, Any], remove: list[str]) -> None:
        self.calls += 1
        self.running += 1
        assert self.running == 1, "one change at a time"
        await asyncio.sleep(0.01)
        self.running -= 1
        if self.errors:
            raise self.errors.pop(0)
        for name in remove:
            del self.apps[name]
        self.apps |= {name: app(self.status, "ValueError: too large") for name in start}


def follow_pins(scenario: Callable[[PinnedApps, Callable[..., None]], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        apps = PinnedApps("fleet")
        apps.duty.start()

        def want(*versions: int) -> None:
            apps.want(Place("run"), "r1", Serving(pinned=list(versions)))

        await scenario(apps, want)
        apps.duty.close()

    asyncio.run(run())


def test_a_pin_that_could_not_be_started_is_tried_again_and_fails_none_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.errors = [OSError("no room"), FleetError("busy")]

    async def scenario(apps: PinnedApps, want: Callable[..., None]) -> None:
        want(3)
        assert apps.states == {3: PinState(state="starting")}
        await until(lambda: apps.duty.trouble is not None)
        assert apps.states == {3: PinState(state="failing", reason="OSError: no room")}
        want(3, 5)
        await until(lambda: set(world.apps) == {"fleet-pinned-r1-3", "fleet-pinned-r1-5"})
        await until(lambda: apps.duty.trouble is None)
        assert apps.states == {3: PinState(state="pinned"), 5: PinState(state="pinned")}
        del world.apps["fleet-pinned-r1-3"]  # a cluster that loses its Serve, say
        await until(lambda: "fleet-pinned-r1-3" in world.apps)
        want()
        await until(lambda: not world.apps)
        assert apps.states == {}

    follow_pins(scenario)


def test_pins_run_on_while_a_store_that_started_again_does_not_know_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.apps = {f"fleet-pinned-r1-{version}": app("RUNNING") for version in (3, 5)}

    async def scenario(apps: PinnedApps, want: Callable[..., None]) -> None:
        await apps.duty.stepped(30.0)
        assert set(world.apps) == {"fleet-pinned-r1-3", "fleet-pinned-r1-5"} and not world.calls
        want(5)
        await until(lambda: set(world.apps) == {"fleet-pinned-r1-5"})

    follow_pins(scenario)


def test_an_application_that_failed_is_started_again_with_growing_pauses_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.status = "DEPLOY_FAILED"

    async def scenario(apps: PinnedApps, want: Callable[..., None]) -> None:
        want(3)
        await until(lambda: apps.duty.trouble is not None and apps.duty.trouble.tries >= 3)
        assert apps.duty.trouble is not None
        assert apps.duty.trouble.reason == "version 3 does not start: ValueError: too large"
        assert world.calls <= apps.duty.trouble.tries + 1, "each start is a try"
        world.status = "RUNNING"
        await until(lambda: apps.duty.trouble is None)
        before = "it did not start before: ValueError: too large"
        assert apps.states == {3: PinState(state="starting", reason=before)}, "until a replica has run"
        world.apps = {name: app("RUNNING", running=1) for name in world.apps}
        await until(lambda: apps.states == {3: PinState(state="pinned")})
        world.apps = {name: app("RUNNING") for name in world.apps}
        await apps.duty.stepped(30.0)
        assert apps.states == {3: PinState(state="pinned")}

    follow_pins(scenario)


@pytest.mark.slow
def test_a_pin_of_a_run_that_cannot_be_opened_yet_is_up_once_it_can(
    own_serve: None, tmp_path: Path, tiny_model: Path
) -> None:
    from sampo_ray.actors.weights.store import start_weight_store

    config = {"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}}
    run = create_run(load_config(config))
    info = VersionInfo(version=0, round=0, step=0)
    write_version(run.versions.at("000000").url, [("w", torch.ones(5))], str(tiny_model), info)
    serve.start(proxy_location="Disabled")
    store = start_weight_store("test-pins", f"{tmp_path}/store.json", "test")

    def state() -> StoreState:
        return ray.get(store.state.remote(), timeout=scaled(60))

    ray.get(store.attach.remote(run.id, run.versions.url), timeout=scaled(60))
    manifest = run.place.at("manifest.json").read()
    run.place.at("manifest.json").remove()
    answer = ray.get(store.command.remote(commands.Pin("0"), "id"), timeout=scaled(60))
    assert answer.state.pins[0].state != "pinned"
    wait_until(lambda: state().pins[0].state == "failing", "failure of the pin")
    (trouble,) = state().troubles
    assert trouble.what == "pinned versions" and "holds no run" in trouble.reason
    wait_until(lambda: any(report.troubles for report in read_reports(run.place)), "report of it")
    run.place.at("manifest.json").write(manifest)
    wait_until(lambda: state().pins[0].state == "pinned" and not state().troubles, "pin")
    (name,) = (name for name in serve.status().applications if name.startswith("test-pinned-"))
    serve.delete(name)
    wait_until(lambda: name in serve.status().applications, "application that was lost")
    ray.get(store.command.remote(commands.Unpin("0"), "other"), timeout=scaled(60))
    wait_until(lambda: name not in serve.status().applications, "end of the application")
    ray.kill(store)


@serve.deployment(autoscaling_config={"min_replicas": 0, "max_replicas": 1}, ray_actor_options={"num_cpus": 0.1})
class Fragile:
    """Starts only while its file does not exist."""

    def __init__(self, bad: str) -> None:
        if Path(bad).exists():
            raise ValueError("no room for the cache")

    def __call__(self) -> str:
        return "here"


@pytest.mark.slow
def test_a_pin_whose_replica_could_not_start_answers_once_it_can(
    own_serve: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad"
    bad.touch()

    @ray.remote(num_cpus=0)
    def carry_out(place: Place, run: str, start: dict[str, Any], remove: list[str]) -> None:
        pinned.delete_apps(remove)
        targets = [serve.RunTarget(Fragile.bind(str(bad)), name=name, route_prefix=None) for name in start]
        serve.run_many(targets, wait_for_applications_running=False)

    async def scenario(apps: PinnedApps, want: Callable[..., None]) -> None:
        want(3)
        await until(lambda: apps.states[3].state == "pinned")
        handle = await asyncio.to_thread(serve.get_app_handle, "fleet-pinned-r1-3")
        asked = handle.remote()
        await until(lambda: apps.duty.trouble is not None, 120.0)
        assert apps.states[3] == PinState(state="failing", reason="ValueError: no room for the cache")
        bad.unlink()
        asked.cancel()
        await until(lambda: apps.duty.trouble is None, 120.0)
        answer, begun = None, time.monotonic()
        while answer is None and time.monotonic() - begun < scaled(60):
            try:  # by the handle that a gateway would have had all the time
                answer = await asyncio.wait_for(handle.remote(), scaled(60))
            except DeploymentUnavailableError:  # what it knows is a moment old
                await asyncio.sleep(0.2)
        assert answer == "here"
        await until(lambda: apps.states[3] == PinState(state="pinned"))
        want()
        await until(lambda: "fleet-pinned-r1-3" not in serve.status().applications, 120.0)

    serve.start(proxy_location="Disabled")
    monkeypatch.setattr(pinned, "_carry_out", carry_out)
    follow_pins(scenario)
