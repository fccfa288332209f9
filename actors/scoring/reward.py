"""Reward workers: a Serve deployment that scores completion blocks with a Python function or a reward model."""

import asyncio
import functools
import json
import logging
import threading
import traceback
from collections.abc import Callable, Sequence

import pyarrow as pa
import tenacity
import torch
from ray import serve

from sampo_ray.config.sections import FleetConfig, RewardConfig
from sampo_ray.data.preferences import SCORES
from sampo_ray.data.rewards import RewardModel, Scorer, call_function, columns_of, function_source, load_function
from sampo_ray.errors import RewardError

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class RewardWorker:
    """A replica. `source` is the text of the file in `file.py:function`, which need not exist on this node."""

    def __init__(self, config: RewardConfig, source: str | None, hung_limit: int) -> None:
        self.config, self.hung_limit = config, hung_limit
        self.hung = 0
        self.scorer = _load(config, source)

    async def score(self, completions: pa.Table) -> pa.Table:
        """COMPLETIONS -> SCORES, in the same order; the source gets the whole block in one call.

        A call that raises or takes longer than `timeout_s` is repeated `retries` times with growing pauses; if all
        fail, the block's rewards are null. Raises RewardError if the source returns anything but one finite number per
        completion.
        """
        prompts = [json.loads(text) for text in completions["messages"].to_pylist()]
        call = functools.partial(self.scorer, prompts, completions["text"].to_pylist(), columns_of(completions))
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, Exception) and not isinstance(e, RewardError)),
            stop=tenacity.stop_after_attempt(1 + self.config.retries),
            wait=tenacity.wait_exponential(_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
            after=self._warn,
            retry_error_callback=lambda _: [None] * len(prompts),
        )
        rewards: Sequence[float | None] = await retrying(self._call, call) if prompts else []
        return completions.append_column(SCORES.field("reward"), pa.array(rewards, pa.float64()))

    def check_health(self) -> None:
        """Fails when too many calls hang: threads cannot be stopped, so Serve must replace the replica."""
        if self.hung >= self.hung_limit:
            raise RuntimeError(f"{self.hung} calls of the reward source hang beyond reward.timeout_s")

    def _warn(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        place = traceback.extract_tb(error.__traceback__)[-1]
        # The error's message is left out: it may quote a prompt.
        found = type(error).__name__, place.filename, place.lineno
        log.warning("reward call %d of %d failed: %s in %s:%s", state.attempt_number, 1 + self.config.retries, *found)

    async def _call(self, call: functools.partial[list[float]]) -> list[float]:
        """Runs the call in a new thread, so that a call that hangs does not delay the others."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[float]] = loop.create_future()

        def finish(set_outcome: Callable[[], None]) -> None:
            if answer.done():  # given up, but it returned after all
                self.hung -= 1
            else:
                set_outcome()

        def work() -> None:
            try:
                outcome = functools.partial(answer.set_result, call())
            except Exception as error:  # raised by the waiting request
                outcome = functools.partial(answer.set_exception, error)
            loop.call_soon_threadsafe(finish, outcome)

        threading.Thread(target=work, daemon=True).start()
        try:
            return await asyncio.wait_for(answer, self.config.timeout_s)
        finally:
            if answer.cancelled():
                self.hung += 1


def build_reward_app(config: RewardConfig, fleet: FleetConfig) -> serve.Application:
    """The application of a run's reward workers; its handle has `score(COMPLETIONS) -> SCORES`.

    A function in a file is sent as text, so only this machine needs the file. A module must be importable on every
    node (through the job's working directory, for example), and a reward model's path must be readable there.
    """
    source = None if config.function is None else function_source(config.function)
    deploy = serve.deployment(
        max_ongoing_requests=fleet.max_ongoing_requests,
        max_queued_requests=fleet.max_queued_requests,
        autoscaling_config=fleet.autoscaling,
        ray_actor_options={
            "num_cpus": 0.1 if fleet.num_cpus is None else fleet.num_cpus,
            "num_gpus": fleet.num_gpus or 0,
        },
    )
    return deploy(RewardWorker).bind(config, source, fleet.max_ongoing_requests)


def _load(config: RewardConfig, source: str | None) -> Scorer:
    if config.function is not None:
        return functools.partial(call_function, load_function(config.function, source))
    assert config.model is not None
    return RewardModel(config.model, "cuda" if torch.cuda.is_available() else "cpu")
