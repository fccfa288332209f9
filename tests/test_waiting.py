"""The limits of the other tests."""

import itertools

import pytest

from tests import waiting
from tests.waiting import FRESH_S, KNOWN_WORK_S, Slowness, wait_until


def test_limits_grow_with_what_known_work_takes_and_are_never_below_what_is_written() -> None:
    took, now = [0.1, 4.0, 2.0], [0.0]
    slowness = Slowness(lambda: took.pop(0) * KNOWN_WORK_S, lambda: now[0])
    factors = []
    for _ in range(3):
        slowness.look()
        slowness.look()  # measured a moment ago: not again
        factors.append(slowness.factor)
        now[0] += FRESH_S + 1
    assert factors == pytest.approx([1.0, 4.0, 4.0])


def test_a_machine_that_becomes_busy_while_a_test_waits_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slowness(lambda: 1000 * KNOWN_WORK_S)
    monkeypatch.setattr(waiting, "SLOWNESS", slow)
    asked = itertools.count()
    wait_until(lambda: next(asked) > 3, "answer", seconds=0.01, every=0.02)
    assert slow.factor == pytest.approx(1000)
    with pytest.raises(AssertionError, match="no answer within 0 s"):
        monkeypatch.setattr(waiting, "SLOWNESS", Slowness(lambda: 0.0))
        wait_until(lambda: False, "answer", seconds=0.0)
