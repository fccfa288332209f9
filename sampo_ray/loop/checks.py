"""The end of a run waits for the checks of its last version: the generators that answer for them end with the run."""

import time
from collections.abc import Callable

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

ASK_S, ANSWER_S = 5.0, 60.0
LIMIT_S = 1800.0


def await_checks(store: ActorHandle, note: Callable[[str], None], limit_s: float = LIMIT_S) -> None:
    """Waits until the store has checked the newest version (`serve.gates`), if that is for it to do. `note` is told
    that it is waited for, and why a version was not checked within `limit_s`, or before the store failed: training has
    succeeded without."""
    until, waiting = time.monotonic() + limit_s, False
    try:
        while not ray.get(store.checked.remote(ASK_S), timeout=ASK_S + ANSWER_S):
            if time.monotonic() > until:
                state = ray.get(store.state.remote(), timeout=ANSWER_S)
                reasons = [trouble.reason for trouble in state.troubles] or [f"not within {limit_s:.0f} s"]
                note(_unchecked("; ".join(reasons)))
                return
            if not waiting:
                note("waiting for the checks of the last version (serve.gates)")
            waiting = True
    except RayError as error:
        note(_unchecked(f"the weight store does not answer: {type(error).__name__}"))


def _unchecked(why: str) -> str:
    return f"the last version could not be checked ({why}) and is not live; `sampo promote` makes it live without"
