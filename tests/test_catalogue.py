"""Which models the endpoint lists and answers for, and commands whose answers are late."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray.exceptions import RayTaskError

from sampo_ray.actors.weights.client import CommandAnswer, StoreState
from sampo_ray.errors import VersionError
from sampo_ray.run import commands, serving
from sampo_ray.run.report import PinState, Trouble
from sampo_ray.run.serving import Adapter, Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import AdaptersInfo, VersionInfo
from sampo_ray.serve import catalogue, errors
from sampo_ray.serve.catalogue import Catalogue
from sampo_ray.serve.errors import ApiError
from sampo_ray.serve.routes.admin import ADMIN_ROUTES, AdminRoutes

INFOS = {
    version: VersionInfo(version=version, round=0, step=version, labels=labels)
    for version, labels in ((0, ()), (5, ("round-1",)), (6, ()), (8, ("round-2",)), (12, ("final",)))
}
INFOS[6] = INFOS[6].model_copy(update={"adapters": AdaptersInfo(base=5, rank=8, scaling=1.0)})
STATE = Serving(live=12, sequence=3, passed=[0, 5, 8, 12], pinned=[0], refused={}, previous=[5, 8])
STATE = STATE.model_copy(
    update={
        "adapters": {"tune": Adapter(base=0, rank=8), "late": Adapter(base=8, rank=8), "6": Adapter(base=5, rank=8)}
    }
)
UP, DOWN = PinState(state="pinned"), PinState(state="failing", reason="no room")
PINS = {0: UP, 5: UP, 8: PinState(state="starting")}


def state(versions: Mapping[int, PinState] = PINS, now: Serving = STATE) -> StoreState:
    """What the store says when adapters are as far as the versions that they are on."""
    pins = {**versions, **{6 if n == "6" else n: versions.get(a.base, UP) for n, a in now.adapters.items()}}
    troubles = (Trouble(what="pinned versions", reason="no room", since=1.0, last=2.0, tries=3),)
    return StoreState("r1", "fleet", now, serving.listing(now, INFOS, pins), pins, troubles, now.sequence)


def asked(monkeypatch: pytest.MonkeyPatch, use: Callable[[Catalogue], Awaitable[Any]], said: StoreState) -> Any:
    async def answer() -> StoreState:
        return said

    store = SimpleNamespace(state=SimpleNamespace(remote=answer))
    monkeypatch.setattr(catalogue, "find_weight_store", lambda name: store)
    return asyncio.run(use(Catalogue("live-app", "store")))


async def outcome(model: str, of: Catalogue) -> tuple[int, str]:
    """Status and application that would answer, or the message."""
    try:
        target = await of.target(model)
    except ApiError as error:
        return error.status, error.message
    return 200, target.app


@pytest.mark.parametrize("pins", itertools.product([UP, DOWN, PinState(state="starting")], repeat=3))
def test_what_is_listed_is_answered_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch, pins: Any) -> None:
    said = state(dict(zip((0, 5, 8), pins, strict=True)))

    async def listed(of: Catalogue) -> list[str]:
        ids = [card["id"] for card in await of.cards()]
        for model in ids:
            assert (await outcome(model, of))[0] == 200, model
            assert (await of.card(model))["id"] == model
        assert "policy@nothing" not in ids
        for name in (*INFOS, *STATE.named_adapters):
            found, _ = await outcome(f"policy@{name}", of)
            starting = f"policy@{name}" not in ids and found == 200
            assert starting == (said.pin(name).state == "starting"), "which is waited for"
        return ids

    ids = asked(monkeypatch, listed, said)
    names = [name for name in (8, 6, 5, 0, "tune", "late") if said.pins[name].state == "pinned"]
    assert ids == ["policy", "policy@12", *(f"policy@{name}" for name in names)]


def test_a_version_that_does_not_answer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def messages(of: Catalogue) -> list[tuple[int, str]]:
        return [await outcome(model, of) for model in ("policy@0", "policy@round-1", "policy@tune", "policy@6")]

    kept = STATE.model_copy(update={"pinned": [0], "adapters": {"tune": STATE.adapters["tune"]}})
    failing, unpinned, adapter, version = asked(monkeypatch, messages, state({0: DOWN}, kept))
    for what, said in (("version 0", failing), ("adapter tune", adapter)):
        assert said == (503, f"{what} is pinned, but does not start; an admin finds why in /admin/versions")
    assert unpinned[0] == version[0] == 404
    assert unpinned[1].endswith(
        "version 5 is kept but not pinned; an admin can pin it; this endpoint serves policy, policy@12, policy@final"
    )


def test_a_live_version_whose_own_application_does_not_run_is_answered_by_the_live_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pin, app in ((UP, "fleet-pinned-r1-12"), (DOWN, "live-app")):
        now = STATE.model_copy(update={"pinned": [12], "adapters": {}})
        assert asked(monkeypatch, lambda of: outcome("policy@12", of), state({12: pin}, now)) == (200, app)


class Store:
    """A weight store behind a lock that somebody may hold, on a real serving.json; `asked` counts its commands."""

    def __init__(self, folder: Path) -> None:
        self.place, self.asked, self.free = Place(str(folder)), 0, asyncio.Event()
        self.command, self.state = SimpleNamespace(remote=self._command), SimpleNamespace(remote=self._state)
        serving.edit_serving(self.place, lambda _: STATE)

    async def _command(self, command: commands.Command, id: str) -> CommandAnswer:
        self.asked += 1
        await self.free.wait()
        try:
            before = commands.done_before(serving.read_serving(self.place), id, command)
        except VersionError as error:
            raise RayTaskError("command", "traceback", error) from None
        now = serving.edit_serving(self.place, lambda state: commands.apply_once(state, INFOS, id, command))
        return CommandAnswer(before or now.done[-1], before is not None, state(PINS, now))

    async def _state(self) -> StoreState:
        return state(PINS, serving.read_serving(self.place))


class Admin(AdminRoutes):
    def __init__(self) -> None:
        self.catalogue = Catalogue("live-app", "store")


def admin_client() -> httpx.AsyncClient:
    app, admin = FastAPI(), Admin()
    errors.install(app)
    for name, route in ADMIN_ROUTES.items():
        route(app)(getattr(admin, name))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def test_a_rollback_whose_answer_is_late_and_that_is_sent_again_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        store = Store(tmp_path)
        monkeypatch.setattr(catalogue, "find_weight_store", lambda name: store)
        monkeypatch.setattr(catalogue, "COMMAND_TIMEOUT_S", 0.05)
        late = [asyncio.ensure_future(store._command(commands.Rollback(), "mine"))]  # whose client has given up
        async with admin_client() as client:
            headers = {"Idempotency-Key": "mine"}
            timed_out = await client.post("/admin/rollback", json={}, headers=headers)
            assert timed_out.status_code == 503
            assert "send it again, with the header Idempotency-Key: mine" in timed_out.json()["error"]["message"]
            store.free.set()
            await asyncio.gather(*late)
            monkeypatch.setattr(catalogue, "COMMAND_TIMEOUT_S", 30.0)
            again = await client.post("/admin/rollback", json={}, headers=headers)
            assert again.json()["command"] == {"id": "mine", "live": 8, "repeated": True}
            assert again.json()["live"] == 8 and store.asked == 3
            assert again.headers["idempotency-key"] == "mine" and again.headers["idempotent-replayed"] == "true"
            other = await client.post("/admin/promote", json={"version": 5}, headers=headers)
            assert other.status_code == 409 and "the id mine is that of another command" in other.text
            second = await client.post("/admin/rollback", json={})
            assert second.json()["live"] == 5 and second.headers["idempotency-key"] != "mine"
            assert "idempotent-replayed" not in second.headers

    asyncio.run(scenario())


@pytest.mark.parametrize("id", ["two words", "a" * 101, "naïve".encode().decode("latin-1")])
def test_an_id_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id: str) -> None:
    async def scenario() -> None:
        store = Store(tmp_path)
        monkeypatch.setattr(catalogue, "find_weight_store", lambda name: store)
        async with admin_client() as client:
            answer = await client.post("/admin/rollback", json={}, headers={"Idempotency-Key": id.encode("latin-1")})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "Idempotency-Key" and not store.asked

    asyncio.run(scenario())


def test_an_admin_sees_which_pins_are_up_and_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = Store(tmp_path)
        monkeypatch.setattr(catalogue, "find_weight_store", lambda name: store)
        monkeypatch.setitem(PINS, 8, DOWN)
        async with admin_client() as client:
            view = (await client.get("/admin/versions")).json()
        states = {each["version"]: (each["state"], each["reason"]) for each in view["versions"]}
        assert states[8] == ("failing", "no room") and states[5] == states[6] == ("pinned", None)
        assert view["pins"]["8"] == {"state": "failing", "reason": "no room"}
        (trouble,) = view["troubles"]
        assert trouble == {"what": "pinned versions", "reason": "no room", "since": 1.0, "last": 2.0, "tries": 3}

    asyncio.run(scenario())


ASKED = {"policy": (None, None), "policy@12": (12, ("r1", 3)), "policy@5": (5, None)}


def test_a_version_that_is_live_is_asked_for_with_the_position_from_which_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {model: asked(monkeypatch, lambda of, model=model: of.target(model), state()) for model in ASKED}
    assert {model: (target.version, target.position) for model, target in found.items()} == ASKED
