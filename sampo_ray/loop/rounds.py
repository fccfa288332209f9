"""One round of a run: its stages, each done once, and what the run directory records of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.config.run import RunConfig
from sampo_ray.data.sources import fingerprint
from sampo_ray.errors import StageError
from sampo_ray.loop import stages
from sampo_ray.loop.display import Display
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import DataRecord, StageRecord
from sampo_ray.run.parts import Part, parts_of
from sampo_ray.run.steps import StepResult
from sampo_ray.run.storage import Place
from sampo_ray.run.version_folders import complete_versions, version_folder
from sampo_ray.run.versions import read_serving
from sampo_ray.training.batching import Lengths, steps_in_round
from sampo_ray.training.streams import Stream, rollout_seed

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from sampo_ray.actors.ranks.trainer import Trainer


def tokenize(run: Run, display: Display) -> list[Part]:
    """The run's preference pairs (offline) or prompts (online) as parts of token ids, made once for all rounds."""
    config, place = run.config, run.place.at("data")
    kind = "prompts" if config.online else "pairs"
    found = run.manifest.data
    if found is None:
        source = config.data.prompts if config.online else config.data.train
        assert source is not None, "validated with the configuration"
        data = config.data
        if config.online:  # a completion of max_tokens must fit behind any prompt
            limit = min(data.prompt_limit, data.max_length - config.rollout.max_tokens)
            data = data.model_copy(update={"max_prompt_length": limit})
        with display.stage("tokenize", None, kind):
            tokenized = stages.tokenize(place, source, kind, run.place.at("tokenizer"), data)
        found = DataRecord(source=source, fingerprint=fingerprint(source), **tokenized.model_dump())
        run.manifest.data = found
        run.save()
    dropped = "".join(f", {n} dropped: {reason}" for reason, n in found.dropped.items())
    display.note(f"{sum(found.rows)} {kind} of {found.rows_read} rows{dropped}")
    if found.prompts_cut or found.responses_cut:
        display.note(f"cut to length: {found.prompts_cut} prompts, {found.responses_cut} responses")
    return parts_of(place, found.rows)


def prompts_of(config: RunConfig, index: int, total: int) -> np.ndarray:
    """Which of `total` prompts are round `index`'s, in its order: [prompts], int64."""
    n = config.rollout.prompts or -(-total // config.rounds.count)
    passes = range(n * index // total, (n * (index + 1) - 1) // total + 1)
    rng = [Stream.PROMPT_ORDER.generator(seed=config.run.seed, cycle=again) for again in passes]
    order = np.concatenate([each.permutation(total) for each in rng])
    return order[n * index - passes.start * total :][:n]


def draw(
    config: RunConfig,
    index: int,
    prompts: Sequence[Part],
    out: Place,
    generators: Callable[[int | None], "DeploymentHandle"],
    weights: tuple[str, int] | None,
    progress: Callable[[int], None] = lambda rows: None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Part]:
    """Completions of round `index`; see stages.sample."""
    settings = config.fleet.generators
    window = (settings.max_replicas or 1) * settings.max_ongoing_requests
    seed = rollout_seed(config.run.seed, index)
    return stages.sample(generators, prompts, out, config.rollout, seed, weights, window, progress, enough)


@dataclass(frozen=True)
class Output:
    """What a stage made, and what the manifest is to record of it besides its parts."""

    parts: list[Part]
    facts: StageRecord = field(default_factory=StageRecord)


StageWork = Callable[[Place, Callable[[int], None]], Output]
"""Makes a stage's parts in a folder, and reports progress in rows."""


class Round:
    """A round in progress. Every stage is recorded in the manifest once it is complete, and then only looked up."""

    def __init__(self, run: Run, index: int, display: Display) -> None:
        self.run, self.index, self.display, self.config = run, index, display, run.config
        self._record = run.round(index)
        self._place = run.place.at("rounds", str(index))
        self.seconds_left: float | None = None
        """Of the training, at its present pace; None before the first step."""
        if not self.committed:
            display.round(index, run.config.rounds.count)

    @property
    def committed(self) -> bool:
        return self._record.committed

    @property
    def start(self) -> tuple[str, int]:
        """The weights that the round starts from, which are its reference: run and version."""
        return self.run.id, self._record.start_version

    @property
    def end(self) -> tuple[str, int]:
        """The weights that the round ends with, known once it trains: run and version."""
        return self.run.id, self._record.end_version

    def prompts(self, data: Sequence[Part]) -> list[Part]:
        """The round's share of the prompts; a run that has used all of them begins again in another order."""
        mine = prompts_of(self.config, self.index, sum(part.rows for part in data))

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            return Output(stages.gather(data, mine, out, stages.PART_PROMPTS, progress))

        return self._stage("prompts", len(mine), "prompts", work)

    def sample(self, prompts: Sequence[Part], generators: Callable[[int | None], "DeploymentHandle"]) -> list[Part]:
        """Completions of the round's prompts, drawn from the policy that the round starts from, but for those that were
        drawn ahead from older weights; how old they are is recorded and said.
        """

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            parts = draw(self.config, self.index, prompts, out, generators, self.start, progress)
            age = stages.age(parts, self.start[1]) if self.config.rollout.ahead else None
            return Output(parts, StageRecord(age=age))

        total = sum(part.rows for part in prompts) * self.config.rollout.samples
        parts = self._stage("completions", total, "samples", work)
        if age := self._record.stages["completions"].age:
            self.display.note(f"age of the completions, in steps: mean {age.mean:.1f}, most {age.most}")
        return parts

    def score(self, completions: Sequence[Part], rewards: "DeploymentHandle") -> list[Part]:
        window = (self.config.fleet.rewards.max_replicas or 1) * self.config.fleet.rewards.max_ongoing_requests

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            return Output(stages.score(rewards, completions, out, window, progress))

        return self._stage("scores", sum(part.rows for part in completions), "samples", work)

    def best_against_worst(self, scores: Sequence[Part]) -> list[Part]:
        """Candidate pairs; prompts without a usable pair are dropped and counted."""

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            parts, dropped = stages.pair(scores, out)
            return Output(parts, StageRecord(dropped=dropped))

        parts = self._stage("candidates", None, "pairs", work)
        if dropped := self._record.stages["candidates"].dropped:
            self.display.note("no pair: " + ", ".join(f"{n} {reason}" for reason, n in dropped.items()))
        return parts

    def feedback(self) -> list[Part]:
        """Pairs out of votes that came in before the round began; a vote is used in one round. None if it is off."""
        done, off = self._record.stages, not self.config.serve.feedback.keep_hours
        if "feedback" not in done and (off or "pairs" in done):  # turned on when the round had its pairs already
            return []
        before = [r.index for r in self.run.manifest.rounds[: self.index] if "feedback" in r.stages]
        earlier = [self.run.place.at("rounds", str(index), "feedback") for index in before]

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            place, tokenizer = self.run.place, self.run.place.at("tokenizer")
            made = stages.feedback(out, place, earlier, tokenizer, self.config.data)
            facts = StageRecord(votes=made.votes, left=made.left, **made.tokenized.model_dump())
            return Output(parts_of(out, made.tokenized.rows), facts)

        parts = self._stage("feedback", None, "pairs", work)
        left = ", ".join(f"{n} {reason}" for reason, n in (done["feedback"].left or {}).items())
        self.display.note(
            f"{sum(part.rows for part in parts)} pairs from feedback" + (f" (without: {left})" if left else "")
        )
        return parts

    def pairs(self, source: Sequence[Part], said: Sequence[Part] = ()) -> list[Part]:
        """The round's pairs in training order, in parts of whole global batches; those from feedback among them."""
        total, more = (sum(part.rows for part in parts) for parts in (source, said))
        if not total + more:
            raise StageError(
                f"round {self.index + 1} has no preference pairs; look at the reward source and the prompts"
            )
        seed = self.config.run.seed
        order = Stream.PAIR_ORDER.generator(seed=seed, round=self.index).permutation(total)
        if self.config.rounds.data == "split":
            order = Stream.SPLIT.generator(seed=seed).permutation(total)
            order = np.array_split(order, self.config.rounds.count)[self.index]
        if more:
            order = np.concatenate([order, np.arange(total, total + more)])
            order = Stream.FEEDBACK_ORDER.generator(seed=seed, round=self.index).permutation(order)
        batch = self.config.optim.batch_size
        rows = -(-stages.PART_PAIRS // batch) * batch

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            return Output(stages.gather([*source, *said], order, out, rows, progress))

        return self._stage("pairs", len(order), "pairs", work)

    def reference(self, pairs: Sequence[Part], references: "DeploymentHandle | None") -> list[Part]:
        """The pairs with their token log-probs under the policy that the round starts from; as they are, where the loss
        needs none or the trainer computes them.
        """
        if not self.config.reference_workers:
            return list(pairs)
        assert references is not None, "the fleet was started for a run without reference workers"
        config, settings = self.config, self.config.fleet.references
        window = (settings.max_replicas or 1) * settings.max_ongoing_requests

        def work(out: Place, progress: Callable[[int], None]) -> Output:
            return Output(
                stages.reference(
                    references, pairs, out, self.start, self.run.versions, config, self.index, window, progress
                )
            )

        return self._stage("reference", sum(part.rows for part in pairs), "pairs", work)

    def train(self, pairs: Sequence[Part], trainer: "Trainer") -> Iterator[StepResult]:
        """Trains on the pairs from where the last checkpoint stands, and yields each step's result."""
        spec = self._spec(pairs, stages.lengths(pairs))
        if self._record.steps is None:
            self._record.steps = spec.steps
            self.run.save()
        checkpoint = self.run.manifest.checkpoint
        done = checkpoint.step if checkpoint and checkpoint.round == self.index else 0
        started = time.monotonic()
        with self.display.stage("train", spec.steps, "steps") as progress:
            progress.advance(done)
            for step, result in enumerate(trainer.train(spec, after_step=done), start=1):
                self.seconds_left = (time.monotonic() - started) / step * (spec.steps - done - step)
                yield result
                progress.advance(1)
        self._record.stages["train"] = StageRecord(steps=spec.steps, seconds=seconds_since(started))

    def record(self, result: StepResult) -> None:
        """Records a step's metrics, version and, in the manifest, checkpoint; removes versions and checkpoints that it
        replaces.
        """
        self.run.record(result.metrics)
        self.display.metrics(result.metrics)
        if result.published:
            self.display.version(result.metrics.version)
            self._prune_versions()
        if new := result.checkpoint:
            manifest = self.run.manifest
            # After a crash it may be one of them that was written again.
            others = [each for each in (manifest.checkpoint, manifest.earlier) if each and each.path != new.path]
            manifest.checkpoint, manifest.earlier = new, next(iter(others), None)
            self.run.save()
            for replaced in others[1:]:
                self.run.place.at(replaced.path).remove()

    def commit(self) -> None:
        """Marks the round as finished. Its export, its last version and its checkpoint are durable by now."""
        self._record.committed = True
        self.run.save()

    def _spec(self, pairs: Sequence[Part], lengths: Lengths) -> RoundSpec:
        config = self.config
        steps = steps_in_round(len(lengths), config.optim.batch_size, config.rounds.epochs)
        run, version = self.start
        return RoundSpec(run, self.run.place, config, self.index, version, steps, tuple(pairs), lengths)

    def _stage(self, name: str, total: int | None, unit: str, work: StageWork) -> list[Part]:
        """A stage's parts: made and recorded, unless the manifest has it already."""
        out = self._place.at(name)
        if name in self._record.stages:
            return parts_of(out, self._record.stages[name].rows or [])
        started = time.monotonic()
        with self.display.stage(name, total, unit) as progress:
            made = work(out, progress.advance)
        counts = {"rows": [part.rows for part in made.parts], "seconds": seconds_since(started)}
        self._record.stages[name] = made.facts.model_copy(update=counts)
        self.run.save()
        return made.parts

    def _prune_versions(self) -> None:
        """Keeps the base, the versions that begin and end rounds, the last `publish.keep`, and what somebody serves."""
        records = self.run.manifest.rounds
        served = read_serving(self.run.place).kept()
        kept = {0} | {r.start_version for r in records} | {r.end_version for r in records}
        others = [v for v in complete_versions(self.run.versions.url) if v not in kept]
        for version in set(others[: -self.config.publish.keep]) - served:
            Place(version_folder(self.run.versions.url, version)).remove()


def seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 2)
