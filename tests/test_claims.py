"""The lease of a run directory on object storage: in whatever order requests arrive, and processes stop, one has it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import greenlet
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.run.claims import MARGIN_S, Claims

LASTS_S = 10.0


class World:
    """Storage whose requests are atomic, with a time; between any two requests another process may go on."""

    def __init__(self, tells_times: bool) -> None:
        self.files, self.time, self.tells_times = dict[str, tuple[bytes, float]](), 0.0, tells_times

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        until = self.time + seconds
        while self.time < until:
            greenlet.getcurrent().parent.switch()


class Folder:
    """What Claims use of a Place."""

    def __init__(self, world: World, name: str = "") -> None:
        self.world, self.name = world, name

    def at(self, name: str) -> "Folder":
        return Folder(self.world, name)

    def _turn(self) -> dict[str, tuple[bytes, float]]:
        greenlet.getcurrent().parent.switch()
        return self.world.files

    def names(self) -> list[str]:
        return sorted(self._turn())

    def create(self, content: bytes) -> bool:
        files = self._turn()
        created = self.name not in files
        if created:
            files[self.name] = content, self.world.time
        self._turn()  # the answer takes its time, too
        return created

    def read(self) -> bytes:
        if self.name not in (files := self._turn()):
            raise FileNotFoundError(self.name)
        return files[self.name][0]

    def modified(self) -> datetime | None:
        if self.name not in (files := self._turn()):
            raise FileNotFoundError(self.name)
        second = timedelta(seconds=int(files[self.name][1]))
        return datetime(2026, 1, 1, tzinfo=UTC) + second if self.world.tells_times else None

    def remove(self) -> None:
        self._turn().pop(self.name, None)


class Process:
    """Takes the lease, renews it while it has it, and says whether it may write."""

    def __init__(self, world: World, life: list[str]) -> None:
        self.world, self.life, self.refused = world, life, False
        self.claims: Any = Claims(Folder(world), LASTS_S, world)  # type: ignore[arg-type]
        self.running = greenlet.greenlet(self._run)

    @property
    def may_write(self) -> bool:
        return not self.refused and self.claims.number > 0 and self.claims.age < LASTS_S

    def _run(self) -> None:
        self.refused = not self.claims.take(lambda _: None)
        for step in self.life:
            if self.refused:
                return
            if step == "give back":
                self.refused = True  # it writes no more from here on
                self.claims.give_back()
                return
            self.world.sleep(LASTS_S / 4)
            self.refused = not self.claims.renew()


LIVES = st.lists(st.sampled_from(["renew"] * 4 + ["give back"]), max_size=5)
TURNS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0] * 8 + [0.5, 3.0, 12.0])), min_size=20, max_size=250)


@given(tells_times=st.booleans(), lives=st.lists(LIVES, min_size=3, max_size=3), turns=TURNS)
def test_at_any_time_one_process_at_most_may_write(
    tells_times: bool, lives: list[list[str]], turns: list[tuple[int, float]]
) -> None:
    world = World(tells_times)
    processes = [Process(world, life) for life in lives]
    for index, seconds in turns:  # who gets none any more was killed
        world.time += seconds
        if not (process := processes[index]).running.dead:
            process.running.switch()
        assert sum(process.may_write for process in processes) <= 1


def finish(world: World, *processes: Process, until: Callable[[], bool] = lambda: False) -> None:
    for _ in range(100_000):
        left = [process for process in processes if not process.running.dead]
        if not left or until():
            return
        world.time += 0.1
        for process in left:
            process.running.switch()
    raise AssertionError("it waits for ever")


@given(tells_times=st.booleans(), after=st.floats(0.0, 3 * LASTS_S))
def test_the_lease_of_a_process_that_was_killed_is_taken_once_it_has_ended(tells_times: bool, after: float) -> None:
    world = World(tells_times)
    killed, next_one = Process(world, []), Process(world, [])
    finish(world, killed)
    assert killed.may_write
    world.time += after
    finish(world, next_one)
    assert next_one.may_write
    slack = MARGIN_S + 4.0
    if tells_times:
        assert next_one.claims.renewed <= max(killed.claims.renewed + LASTS_S, after) + slack
    assert next_one.claims.renewed >= killed.claims.renewed + LASTS_S


def test_a_process_that_lives_keeps_its_lease_and_one_that_ends_gives_it_back() -> None:
    world = World(tells_times=True)
    lives, ends, refused, late = (Process(world, life) for life in (["renew"] * 9, ["give back"], [], []))
    finish(world, lives, until=lambda: lives.claims.number == 2)
    finish(world, lives, refused)
    assert refused.refused and refused.claims.number == 0 and lives.claims.number == 10
    world.time += LASTS_S + MARGIN_S
    finish(world, ends)
    finish(world, late)
    assert late.may_write and late.claims.renewed < ends.claims.renewed + 3.0, "nothing had to end"
    assert len(world.files) == 1, "what was claimed before is removed"


def test_a_number_that_has_been_followed_and_removed_is_not_claimed_again() -> None:
    world = World(tells_times=True)
    slow, lives = Process(world, []), Process(world, ["renew"] * 3)
    for _ in range(9):  # until it is about to claim number 1
        slow.running.switch()
    finish(world, lives)
    assert "000000000001.json" not in world.files
    finish(world, slow)
    assert slow.refused and lives.may_write and len(world.files) == 1
