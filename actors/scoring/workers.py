"""Serve replicas that score blocks: reference log-probs of pairs by the trainer's forward, rewards of completions."""

import asyncio
import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import pyarrow as pa
import tenacity
import torch
from ray import serve

from sampo_ray.actors.nodes import ANYWHERE, Where
from sampo_ray.config.judging import JudgeConfig
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import FleetConfig, RewardConfig, RewardSource
from sampo_ray.data.preferences import SCORES, pairs_of, with_reference
from sampo_ray.data.reward_functions import call_function, function_source, load_function
from sampo_ray.data.reward_models import RewardModel
from sampo_ray.data.rewards import Rewards, Samples, Scorer, weighted_sum
from sampo_ray.errors import RewardError
from sampo_ray.judging.cache import Cache
from sampo_ray.judging.judge import Judge, decided
from sampo_ray.judging.tally import Tally, with_tally
from sampo_ray.run.buckets import flat, views
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import read_version
from sampo_ray.run.versions import WeightsId, version_folder
from sampo_ray.training.objective import reference_positions
from sampo_ray.training.policy import Policy, load_policy, score_pairs

logger = logging.getLogger(__name__)


class ReferenceWorker:
    """Scores pairs with the version that each call names, read from its folder, without gradients; keeps the last one
    loaded."""

    def __init__(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._computing = threading.Lock()  # Serve runs calls in threads, and each may load another version
        self._loaded: WeightsId | None = None
        self._policy: Policy | None = None

    def score(
        self, pairs: pa.Table, run: str, version: int, versions_url: str, config: RunConfig, round: int, out: str
    ) -> pa.Table:
        """Scores a PAIRS block of a round with `version` of `run`; writes and returns a REFERENCE block."""
        with self._computing:
            policy = self._load(WeightsId(run, version), versions_url, config)
            select = reference_positions(config, round)
            scored = with_reference(pairs, score_pairs(policy, pairs_of(pairs), config.row_budget, select))
        Place(out).write_table(scored)
        return scored

    def _load(self, wanted: WeightsId, versions_url: str, config: RunConfig) -> Policy:
        if self._loaded == wanted and self._policy is not None:
            return self._policy
        started = time.monotonic()
        self._loaded = self._policy = None  # frees its memory
        buckets = read_version(version_folder(versions_url, wanted.version))  # verified
        tensors = {name: each.clone() for part in buckets for name, each in views(part.specs, flat(part.data))}
        with Place(versions_url).at("000000").on_disk(["config.json"]) as base:
            policy = load_policy(base, device=_device(), attention=config.model.computed, tensors=tensors)
        self._policy = policy.in_batches(config.batches_answers).eval().requires_grad_(False)
        self._loaded = wanted
        logger.info("reference %s loaded in %.2f s", wanted, time.monotonic() - started)
        return self._policy


def build_reference_app(fleet: FleetConfig, threads: int | None, where: Where = ANYWHERE) -> serve.Application:
    """The reference workers as a Serve application; they load nothing before the first call."""
    deployment = _deployment(ReferenceWorker, fleet, 0.5, where).options(name="references", health_check_timeout_s=120)
    return deployment.bind(threads)


class RewardWorker:
    """Scores with Python functions, reward models and judges. `files` are the texts of the files in `file.py:function`,
    which need not exist on this node, None for others; `verdicts` is where judges keep theirs if they name no place.
    """

    def __init__(
        self, config: RewardConfig, files: Sequence[str | None], verdicts: Place | None, hung_limit: int
    ) -> None:
        self.config, self.hung_limit, self.hung = config, hung_limit, 0
        parts = list(enumerate(zip(config.parts, files, strict=True)))
        self.scorers = {n: _scorer_of(part, file) for n, (part, file) in parts if part.judge is None}
        self.judges = {n: _judge_of(part.judge, verdicts) for n, (part, _) in parts if part.judge is not None}

    async def score(self, completions: pa.Table) -> pa.Table:
        """COMPLETIONS -> SCORES, in the same order; the source gets the whole block in one call.

        A reward is null where the source returns None. A call that raises or takes longer than `timeout_s` is repeated
        `retries` times with growing pauses; if all fail, the block's rewards are null. Raises RewardError if the source
        returns anything else than a finite number or None for each completion.

        Judges have limits of their own; what they took is in the table's metadata: see `tally_of`.
        """
        samples, tally = Samples.of(completions), Tally()
        found = await self._by_scorers(samples) if self.scorers and samples.prompts else {}
        for n, judge in self.judges.items():
            judged = await asyncio.to_thread(judge.score, samples)
            found[n], tally = judged.values, tally + judged.tally
        rewards = weighted_sum([found[n] for n in sorted(found)], [part.weight for part in self.config.parts])
        scores = completions.append_column(SCORES.field("reward"), pa.array(rewards, pa.float64()))
        return with_tally(scores, tally) if self.judges else scores

    async def _by_scorers(self, samples: Samples) -> dict[int, Rewards]:
        """The rewards of each function and model; None for all samples where calls failed."""
        call = functools.partial(self._score, samples)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, Exception) and not isinstance(e, RewardError)),
            stop=tenacity.stop_after_attempt(1 + self.config.retries),
            wait=tenacity.wait_exponential(0.5, max=30.0),
            after=self._warn,
            retry_error_callback=lambda _: {n: [None] * len(samples.prompts) for n in self.scorers},
        )
        rewards: dict[int, Rewards] = await retrying(self._call, call)
        return rewards

    def _score(self, samples: Samples) -> dict[int, Rewards]:
        return {n: scorer(samples) for n, scorer in self.scorers.items()}

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
        logger.warning(
            "reward call %d of %d failed: %s in %s:%s", state.attempt_number, 1 + self.config.retries, *found
        )

    async def _call(self, call: functools.partial[dict[int, Rewards]]) -> dict[int, Rewards]:
        """Runs the call in a new thread, so that a call that hangs does not delay the others."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[int, Rewards]] = loop.create_future()

        def finish(set_outcome: Callable[[], None]) -> None:
            if answer.done():  # given up, but it returned after all
                self.hung -= 1
            else:
                set_outcome()

        def work() -> None:
            try:
                outcome = functools.partial(answer.set_result, call())
            except (StopIteration, SystemExit) as error:  # which a future cannot hold
                stopped = RuntimeError(f"{type(error).__name__} in the reward source")
                outcome = functools.partial(answer.set_exception, stopped)
            except Exception as error:  # raised by the waiting request
                outcome = functools.partial(answer.set_exception, error)
            loop.call_soon_threadsafe(finish, outcome)

        threading.Thread(target=work, daemon=True).start()
        try:
            return await asyncio.wait_for(answer, self.config.timeout_s)
        finally:
            if answer.cancelled():
                self.hung += 1


def _scorer_of(source: RewardSource, file: str | None) -> Scorer:
    if source.function is None:
        assert source.model is not None
        return RewardModel(source.model, _device())
    function = load_function(source.function, file)
    return lambda samples: call_function(function, samples, source.arguments)


def _judge_of(config: JudgeConfig, verdicts: Place | None) -> Judge:
    place = Place(config.cache) if config.cache else verdicts
    known = config if config.weighted is not None else decided(config)
    return Judge(known, Cache(place) if place else None)


def build_reward_app(
    config: RewardConfig, fleet: FleetConfig, where: Where = ANYWHERE, verdicts: Place | None = None
) -> serve.Application:
    """The application of a run's reward workers; its handle has `score(COMPLETIONS) -> SCORES`. `verdicts`: where
    judges keep what they said.

    A function in a file is sent as text, so only this machine needs the file. A module must be importable on every
    node (through the job's working directory, for example), and a reward model's path must be readable there.
    """
    files = [None if part.function is None else function_source(part.function) for part in config.parts]
    return _deployment(RewardWorker, fleet, 0.1, where).bind(config, files, verdicts, fleet.max_ongoing_requests)


def _deployment(worker: type, fleet: FleetConfig, num_cpus: float, where: Where) -> serve.Deployment:
    return serve.deployment(
        worker,
        max_ongoing_requests=fleet.max_ongoing_requests,
        max_queued_requests=fleet.max_queued_requests,
        autoscaling_config=fleet.autoscaling,
        ray_actor_options={
            "num_cpus": num_cpus if fleet.num_cpus is None else fleet.num_cpus,
            "num_gpus": fleet.num_gpus or 0,
            **where.options,
        },
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
