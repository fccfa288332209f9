"""What the weight store brings about in the end: pins, live versions and checks, whatever fails on the way."""

import asyncio
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch

from sampo_ray.actors.weights import live
from sampo_ray.actors.weights.duty import Duty, pause_s, reason_of
from sampo_ray.actors.weights.gates import Verdict
from sampo_ray.actors.weights.live import LivePolicy
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.pinned import PinnedApps
from sampo_ray.errors import FleetError, VersionError
from sampo_ray.run import commands, serving
from sampo_ray.run.serving import Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo, version_folder
from tests.waiting import hurry_duties, until

LONG_S = 30.0
"""For what comes within moments: a limit for a failure only."""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry_duties(monkeypatch)
    monkeypatch.setattr(live, "LOOK_S", 0.05)
    monkeypatch.setattr(live, "LOCK_WAIT_S", 0.1)


def test_pauses_between_failures_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [pause_s(n) for n in (1, 2, 3, 7, 1000)] == [1.0, 2.0, 4.0, 60.0, 60.0]


def test_what_fails_is_tried_until_it_succeeds_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Exception | bool] = [OSError("disk"), OSError("disk"), VersionError("in use"), False, True, False]

    async def scenario() -> None:
        steps = iter(outcomes)

        async def step() -> bool:
            outcome = next(steps, True)
            seen.append(work.trouble)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        work, seen = Duty("the work", step, 0.01), list[Any]()
        work.start()
        await until(lambda: len(seen) > len(outcomes))
        work.close()
        assert [trouble and (trouble.reason, trouble.tries) for trouble in seen[:6]] == [
            None,
            ("OSError: disk", 1),
            ("OSError: disk", 2),
            ("in use", 3),
            ("in use", 3),  # not over, for something is left to do
            None,
        ]
        assert seen[3].since == seen[1].since <= seen[1].last < seen[3].last

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "the work: OSError: disk; it is tried again until it succeeds",
        "the work: in use; it is tried again until it succeeds",
    ]
    assert "the work: well again after 3 failures" in caplog.text


def test_steps_do_not_overlap_and_who_waits_sees_one_that_began_later() -> None:
    async def scenario() -> None:
        running, most, ends = 0, 0, list[float]()

        async def step() -> bool:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            ends.append(time.monotonic())
            return True

        work = Duty("the work", step, 100.0)
        work.start()
        await asyncio.sleep(0.005)  # the first has begun
        asked = time.monotonic()
        await asyncio.gather(work.stepped(LONG_S), work.stepped(LONG_S))
        assert most == 1 and len(ends) == 2 and ends[1] - asked > 0.02
        await work.first_step(0.0)
        hanging = Duty("the work", lambda: asyncio.sleep(100.0, True), 1.0)
        await hanging.stepped(0.01)
        hanging.close()
        work.close()

    asyncio.run(scenario())


def test_a_reason_is_one_line_of_what_happened_there() -> None:
    remote = OSError("here")
    remote.cause = FleetError("version 3 does not start:\n  no memory")  # type: ignore[attr-defined]
    assert reason_of(remote) == "version 3 does not start: no memory"
    assert reason_of(TimeoutError()) == "TimeoutError" and len(reason_of(ValueError("x" * 9999))) == 300


class Policy:
    """A live policy on a run directory, in this process; `publish` does what a training rank and the store do."""

    def __init__(self, folder: Path, shell: Path, watch: bool = False, apps: str = "", **gates: Any) -> None:
        self.folder, self._shell = folder, shell
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(json.dumps({"serve": {"gates": gates}}))
        self.loaded = LoadedVersions("run", str(folder / "versions"), put=lambda bucket: bucket)
        self.poll, self.pins = LongPoll(), PinnedApps(apps)
        self.live = LivePolicy(self.loaded, self.poll, self.pins, asyncio.Lock(), watch)
        self.live.start()

    @property
    def at(self) -> int | None:
        return self.loaded.live and self.loaded.live.id.version

    @property
    def file(self) -> Place:
        return Place(str(self.folder)).at("serving.json")

    @property
    def what(self) -> list[str]:
        return [trouble.what for trouble in self.live.troubles]

    def write(self, version: int) -> None:
        info = VersionInfo(version=version, round=0, step=version)
        write_version(self.place(version), [("w", torch.full((5,), version))], str(self._shell), info)

    def place(self, version: int) -> str:
        return version_folder(self.loaded.url, version)

    async def publish(self, *versions: int) -> None:
        for version in versions:
            self.write(version)
            await self.live.publish()

    def saved(self) -> Serving:
        return serving.read_serving(Place(str(self.folder)))


def with_policy(folder: Path, shell: Path, scenario: Callable[[Policy], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        policy = Policy(folder / "run", shell, **settings)
        try:
            await scenario(policy)
        finally:
            policy.live.close()

    asyncio.run(run())


def test_a_version_that_cannot_go_live_yet_stops_nobody_and_does_so_later(tmp_path: Path, tiny_model: Path) -> None:
    async def scenario(policy: Policy) -> None:
        await policy.publish(0)
        assert policy.at == 0 and policy.live.is_steady
        with filelock.FileLock(policy.folder / "serving.lock"):
            await policy.publish(5, 8)
            await until(lambda: bool(policy.what))
            (trouble,) = policy.live.troubles
            assert "another process has held serving.lock" in trouble.reason
            assert policy.loaded.training is not None and policy.loaded.training.id.version == 8
            assert policy.at == 0 and not policy.live.is_steady
            changed = serving.pin(serving.after(policy.saved(), 7), 0)
            policy.file.write(changed.model_dump_json().encode())  # as another process does that holds the lock
            await until(lambda: policy.loaded.live is not None and policy.loaded.live.sequence == 8)
            await until(lambda: 0 in policy.pins.states)
        await until(lambda: policy.at == 8 and not policy.what)
        assert policy.saved().previous == [0] and policy.live.is_steady

    with_policy(tmp_path, tiny_model, scenario, apps="fleet")


def test_an_edit_of_serving_json_that_fails_is_completed_by_another(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a version that is on disk; also by the next store, where this one has ended meanwhile."""
    replace, full = os.replace, [True]

    def fails(source: str, target: str) -> None:
        if full[0] and str(target).endswith("serving.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    async def scenario(policy: Policy) -> None:
        full[0] = False
        await policy.publish(0)
        full[0] = True
        await policy.publish(5)
        assert policy.what == ["serving.json"] and "No space left" in policy.live.troubles[0].reason
        assert policy.saved().live == policy.at == 0 and policy.loaded.newest == 5
        full[0] = False
        await until(lambda: policy.at == policy.saved().live == 5 and not policy.what)
        full[0] = True
        await policy.publish(8)
        assert policy.saved().live == 5 and sorted(path.name for path in policy.folder.glob("serving*")) == names

    async def restarted(policy: Policy) -> None:
        full[0] = False
        await until(lambda: policy.at == policy.saved().live == 8)

    names = ["serving.json", "serving.lock"]
    monkeypatch.setattr(os, "replace", fails)
    with_policy(tmp_path, tiny_model, scenario)
    with_policy(tmp_path, tiny_model, restarted)


def test_a_damaged_serving_json_leaves_what_is_live_and_is_followed_once_it_is_mended(
    tmp_path: Path, tiny_model: Path
) -> None:
    async def scenario(policy: Policy) -> None:
        await policy.publish(0, 5)
        good = policy.file.read()
        policy.file.write(b"{")
        await policy.publish(8)
        assert policy.what == ["serving.json"] and "restore it" in policy.live.troubles[0].reason
        assert policy.at == 5 and policy.file.read() == b"{"
        with pytest.raises(VersionError, match="cannot be read"):
            await policy.live.command("id", commands.Rollback(), policy.loaded.on_disk())
        policy.file.write(good)
        await until(lambda: policy.at == 8 and not policy.what)
        policy.file.write(b"{")
        await until(lambda: bool(policy.what))
        before = policy.live.serving.sequence
        policy.file.remove()
        await until(lambda: not policy.what)
        assert policy.at == 8 and policy.live.serving.sequence >= before
        policy.file.write(good)  # an old copy: readers who know a later sequence must get what it says
        await until(lambda: policy.live.serving.live == 5 and policy.at == 5)
        assert policy.live.serving.sequence > before

    with_policy(tmp_path, tiny_model, scenario)


def test_a_store_that_starts_on_a_damaged_file_hands_out_training_and_goes_on_later(
    tmp_path: Path, tiny_model: Path
) -> None:
    async def scenario(policy: Policy) -> None:
        policy.write(0)
        policy.file.write(b"{")
        await policy.live.ready(LONG_S)
        await until(lambda: policy.loaded.training is not None)
        assert policy.what == ["serving.json"] and policy.at is None and not policy.live.is_steady
        await policy.publish(5)
        policy.file.remove()
        await until(lambda: policy.at == 5 and not policy.what)

    with_policy(tmp_path, tiny_model, scenario)


def test_a_live_version_that_cannot_be_read_is_tried_again(tmp_path: Path, tiny_model: Path) -> None:
    async def scenario(policy: Policy) -> None:
        await policy.publish(0, 5, 8)
        shard = Path(policy.place(0)) / "model-00001-of-00001.safetensors"
        shard.rename(tmp_path / "aside")
        done, repeated = await policy.live.command("id", commands.Promote("0"), policy.loaded.on_disk())
        await policy.live.loaded()
        assert (done.live, repeated, policy.at, policy.what) == (0, False, 8, ["the live version"])
        (tmp_path / "aside").rename(shard)
        await until(lambda: policy.at == 0 and not policy.what)

    with_policy(tmp_path, tiny_model, scenario)


class Checks:
    """Stands for the task that checks a version: its outcomes in turn, each once `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: Verdict | Exception | None) -> None:
        self.outcomes, self.asked, self.open = list(outcomes), list[int](), asyncio.Event()
        self.open.set()
        monkeypatch.setattr(live, "check", SimpleNamespace(remote=self.check))

    async def check(self, apps: str, place: Place, run: str, version: int, before: int | None) -> Verdict | None:
        self.asked.append(version)
        await self.open.wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


GATED = {"apps": "fleet", "finite": True}


def test_checks_that_could_not_be_made_say_nothing_of_a_version_and_are_made_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch, OSError("no generator"), Verdict(True))

    async def scenario(policy: Policy) -> None:
        await policy.publish(0)
        assert policy.at == 0, "the base needs no checks"
        checks.open.clear()
        await policy.publish(5)
        await until(lambda: checks.asked == [5])
        assert policy.at == 0 and policy.saved().checking == 5 and 5 in policy.saved().kept()
        checks.open.set()
        await until(lambda: policy.at == 5)
        assert (policy.saved().refused, policy.saved().checking, checks.asked) == ({}, None, [5, 5])

    with_policy(tmp_path, tiny_model, scenario, **GATED)


def test_a_version_that_fails_its_checks_is_refused_and_the_next_is_checked(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch, Verdict(False, "too long"), None, Verdict(True))

    async def scenario(policy: Policy) -> None:
        await policy.publish(0)
        checks.open.clear()
        await policy.publish(5)
        await until(lambda: checks.asked == [5])
        await policy.publish(8)  # waits for its turn
        checks.open.set()
        await until(lambda: policy.at == 8)
        assert checks.asked == [5, 8, 8], "a generator that does not hold the newest version yet is asked again"
        assert policy.saved().refused == {5: "too long"}
        await until(lambda: not policy.what)

    with_policy(tmp_path, tiny_model, scenario, **GATED)


def test_a_version_that_is_removed_while_it_is_checked_is_gone_and_not_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch, OSError("version 5 is gone"), Verdict(True))

    async def scenario(policy: Policy) -> None:
        await policy.publish(0)
        checks.open.clear()
        await policy.publish(5)
        await until(lambda: checks.asked == [5])
        shutil.rmtree(policy.place(5))
        checks.open.set()
        await until(lambda: policy.saved().checking is None)
        assert (policy.saved().refused, policy.saved().passed, checks.asked) == ({}, [0], [5])
        await until(lambda: not policy.what)

    with_policy(tmp_path, tiny_model, scenario, **GATED)


def test_a_store_that_watches_wakes_readers_of_new_versions_and_leaves_checks_to_who_trains(
    tmp_path: Path, tiny_model: Path
) -> None:
    async def scenario(policy: Policy) -> None:
        policy.write(0)
        await until(lambda: policy.at == 0)
        known = policy.loaded.training
        assert known is not None
        waiting = asyncio.create_task(policy.poll.wait(lambda: policy.loaded.training, known.id, None, LONG_S))
        await asyncio.sleep(0.01)
        policy.write(5)
        newest = await waiting
        assert newest is not None and newest.id.version == 5
        assert policy.at == 0 and policy.saved().passed == [0]

    with_policy(tmp_path, tiny_model, scenario, watch=True, finite=True)
