"""A run ends when its last version was checked, and says so where that cannot be."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from sampo_ray.loop import checks


class Store:
    """Answers `checked` from a list, and the state that it has then."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *answers: bool | Exception, troubles: tuple[str, ...] = ()
    ) -> None:
        state = SimpleNamespace(troubles=[SimpleNamespace(reason=each) for each in troubles])
        self.answers = list(answers)
        self.handle: Any = SimpleNamespace(
            checked=SimpleNamespace(remote=lambda timeout_s: self.answers.pop(0)),
            state=SimpleNamespace(remote=lambda: state),
        )
        monkeypatch.setattr(checks.ray, "get", self.get)

    def get(self, answer: object, timeout: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_version_that_needs_no_checks_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    checks.await_checks(Store(monkeypatch, True).handle, notes.append)
    assert notes == []


def test_the_checks_of_the_last_version_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    store = Store(monkeypatch, False, False, True)
    checks.await_checks(store.handle, notes.append)
    assert not store.answers and notes == ["waiting for the checks of the last version (serve.gates)"]


def test_a_version_that_could_not_be_checked_is_a_note_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    checks.await_checks(Store(monkeypatch, False, troubles=("no generator",)).handle, notes.append, limit_s=-1.0)
    checks.await_checks(Store(monkeypatch, False).handle, notes.append, limit_s=-1.0)
    checks.await_checks(Store(monkeypatch, ActorUnavailableError("gone", None)).handle, notes.append)
    whys = "no generator", "not within -1 s", "the weight store does not answer: ActorUnavailableError"
    begins = [f"the last version could not be checked ({why}) and is not live; " for why in whys]
    assert all(note.startswith(begin) for note, begin in zip(notes, begins, strict=True))
