"""A policy replica on GPUs that it shares with training ranks by time: its engine sleeps while they work."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future

import ray
from ray.exceptions import RayError

from sampo_ray.actors.policy.lifecycle import end_process, logger
from sampo_ray.actors.weights.client import find_weight_store
from sampo_ray.actors.weights.turns import Turn

POLL_S, ANSWER_S, CHANGING_S = 5.0, 60.0, 1.0

Change = Callable[[], Coroutine[None, None, None]]


class EngineTurns:
    """Asks the weight store `store` whose turn it is, and has the engine sleep and wake.

    A thread asks, so that the store hears from this process for as long as it lives, whatever its event loop does (an
    engine that starts blocks it for a while). While the store is away, all stays as it is.
    """

    def __init__(self, store: str) -> None:
        self._store, self._id = store, os.urandom(8).hex()
        self._sleeps = True  # before it starts, an engine has nothing on the GPU either
        self._may_start, self._changing = threading.Event(), Future[None]()
        self._changing.set_result(None)
        self._obey: Callable[[Turn], Future[None]] | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-turns", daemon=True)
        self._thread.start()

    async def may_start(self) -> None:
        """Waits until an engine may start. From then on this process counts as one that uses its GPUs."""
        while not self._may_start.is_set():
            await asyncio.sleep(CHANGING_S / 10)

    def follow(self, sleep: Change, wake: Change) -> None:
        """Has the running engine sleep and wake from now on. The process ends when it cannot."""
        loop = asyncio.get_running_loop()

        async def change(turn: Turn) -> None:
            try:
                await (sleep() if turn == "ranks" else wake())
            except Exception as error:
                end_process(f"its engine could not leave the GPUs to the {turn}: {error!r}")
            self._sleeps = turn == "ranks"

        self._obey = lambda turn: asyncio.run_coroutine_threadsafe(change(turn), loop)

    def close(self) -> None:
        """Asks no more: this process ends."""
        self._ends.set()
        self._thread.join(CHANGING_S)

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                # Where there is something to do, the store answers at once.
                asked = find_weight_store(self._store).gpu_turn.remote(self._id, self._sleeps, POLL_S)
                self._carry_out(ray.get(asked, timeout=POLL_S + ANSWER_S))
            except (RayError, ValueError) as error:  # also its time-out
                logger.warning("the store does not say whose turn it is on the GPU: %r", error)
                time.sleep(CHANGING_S)

    def _carry_out(self, turn: Turn) -> None:
        if not self._changing.done():
            time.sleep(CHANGING_S)
        elif turn == "engines" and self._sleeps:
            self._sleeps = False
            self._may_start.set()
            if self._obey:
                self._changing = self._obey(turn)
        elif turn == "ranks" and not self._sleeps:
            if self._obey:
                self._changing = self._obey(turn)
            else:
                time.sleep(CHANGING_S)  # it is starting
