"""One round of a run: its stages, each done once, what the run directory records of them, and how the next begins."""

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import ray

from sampo_ray.actors.ranks.exchange import RoundSpec
from sampo_ray.config.run import RunConfig
from sampo_ray.errors import StageError, TrainingError, VersionError
from sampo_ray.loop import stages, tokenizing
from sampo_ray.loop.blocks import StageOutput
from sampo_ray.loop.epochs import LaterEpochs
from sampo_ray.loop.reorder import reorder
from sampo_ray.loop.tokenizing import Tokenizing
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import Checkpoint, StageRecord, StepMetrics, StepResult
from sampo_ray.run.parts import Part, parts_of
from sampo_ray.run.serving import read_serving
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import complete_versions, export_folder, is_complete, remove_version, version_folder
from sampo_ray.sources.probing import completed
from sampo_ray.sources.rows import Kind, cut_to_length
from sampo_ray.sources.source import sources_of
from sampo_ray.training.batching import has_parts_of_its_own, steps_in_round
from sampo_ray.training.streams import Stream, rollout_seed

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from sampo_ray.actors.ranks.trainer import Trainer

CHECKPOINT = re.compile(r"(\d+)-(\d+)")
"""Begin of the names of checkpoints' folders: round and step."""


class StageReporter(Protocol):
    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""

    def expect(self, total: int) -> None:
        """There are `total` units, as far as is known by now."""


class Reporter(Protocol):
    """What the loop reports while it works; the display implements it."""

    def begin_run(self, run: Place) -> None:
        """What follows belongs to the run in this directory."""

    def begin_round(self, index: int, count: int) -> None:
        """Round `index` (from 0) of `count` begins."""

    def stage(self, name: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[StageReporter]:
        """A stage of `total` units (None: unknown), such as `stage("generate", 64, "prompts")`."""

    def metrics(self, step: StepMetrics) -> None:
        """An optimizer step is done."""

    def version(self, number: int) -> None:
        """Policy version `number` is published."""

    def note(self, text: str) -> None:
        """A line that the user should see and keep."""


def tokenize(run: Run, reporter: Reporter) -> list[Part]:
    """The run's preference pairs (offline) or prompts (online) as parts of token ids, made once for all rounds."""
    config, place = run.config, run.place.at("data")
    kind: Kind = "prompts" if config.online else "pairs"
    if run.manifest.data.fingerprint is None:
        sources, seed = completed(sources_of(config.data, kind), kind), config.run.seed
        what = Tokenizing(kind, sources, seed, run.place.at("tokenizer"), config.limits)
        with reporter.stage("tokenize", None, "rows") as progress:
            run.manifest.data = tokenizing.tokenize(what, place, progress)
        run.save()
    found = run.manifest.data
    dropped = "".join(f", {n} dropped: {reason}" for reason, n in found.dropped.items())
    reporter.note(f"{sum(found.rows)} {kind} of {found.rows_read} rows{dropped}")
    if len(found.used) > 1:
        reporter.note("rows of each source: " + ", ".join(f"{name} {n}" for name, n in found.used.items()))
    if config.online and (config.rollout.prompts or 0) > sum(found.rows):
        asked = config.rollout.prompts
        reporter.note(
            f"rollout.prompts={asked} is more than there are: each round samples for all {sum(found.rows)} once"
        )
    if found.prompts_cut or found.responses_cut:
        reporter.note(cut_to_length(found.prompts_cut, found.questions_cut, found.responses_cut))
    return parts_of(place, found.rows)


def prompts_of(config: RunConfig, index: int, total: int) -> np.ndarray:
    """Which of `total` prompts are round `index`'s, in its order: [prompts], int64, no more than there are.

    Rounds go through all prompts again and again, each time in another order. None is twice in a round, where it would
    get the same completions: what a round has of one pass is at the end of the next.
    """
    n = min(config.rollout.prompts or -(-total // config.rounds.count), total)
    left, passes = np.arange(0), itertools.count()
    for _ in range(index + 1):
        taken, left = left[:n], left[n:]
        if len(taken) < n:
            order = Stream.PROMPT_ORDER.generator(seed=config.run.seed, cycle=next(passes)).permutation(total)
            repeated = np.isin(order, taken)
            order = np.concatenate([order[~repeated], order[repeated]])
            taken, left = np.concatenate([taken, order[: n - len(taken)]]), order[n - len(taken) :]
    return taken


def sample(
    config: RunConfig,
    index: int,
    prompts: Sequence[Part],
    out: StageOutput,
    generators: Callable[[int | None], "DeploymentHandle"],
    weights: tuple[str, int] | None,
) -> list[Part]:
    """Completions of round `index`; see stages.sample."""
    seed, window = rollout_seed(config.run.seed, index), stages.capacity(config.fleet.generators)
    return stages.sample(generators, prompts, out, config.rollout, seed, weights, window)


def unfinished(run: Run, reporter: Reporter) -> Iterator["Round"]:
    """The rounds of a run that are still to be done; none after one that fell back."""
    for index in range(run.config.rounds.count):
        round = Round(run, index, reporter)
        if not round.committed:
            yield round
        if round.probed is not None and round.probed.fell_back:
            return


class Round:
    """A round in progress. Every stage is recorded in the manifest once it is complete, and then only looked up."""

    def __init__(self, run: Run, index: int, reporter: Reporter) -> None:
        self.run, self.index, self.reporter, self.config = run, index, reporter, run.config
        self.folder = run.place.at("rounds", str(index))
        self.seconds_left: float | None = None  # of the training, at its present pace; None before the first step
        self._record, self._overtaken, self._unwritten = run.round(index), 0, 0
        if not self.committed:
            reporter.begin_round(index, run.config.rounds.count)

    @property
    def committed(self) -> bool:
        return self._record.committed

    @property
    def probed(self) -> StageRecord | None:
        """What the evaluation at the end of the round decided, once it has."""
        return self._record.probed

    @property
    def start(self) -> tuple[str, int]:
        """Run and version of the weights that the round starts from, which are its reference."""
        return self.run.id, self._record.start_version

    @property
    def end(self) -> tuple[str, int]:
        """Run and version of the weights that the round ends with, known once it trains."""
        return self.run.id, self._record.end_version

    def prompts(self, data: Sequence[Part]) -> list[Part]:
        """The round's share of the prompts; a run that has used all of them begins again in another order."""
        order = prompts_of(self.config, self.index, sum(part.rows for part in data))
        size = stages.PART_PROMPTS
        return self.stage("prompts", len(order), "prompts", lambda out: reorder(data, order, out, size))

    def sample(self, prompts: Sequence[Part], generators: Callable[[int | None], "DeploymentHandle"]) -> list[Part]:
        """Completions by the policy that the round starts from, or sampled ahead from older ones (age is reported)."""

        def make(out: StageOutput) -> list[Part]:
            return sample(self.config, self.index, prompts, out, generators, self.start)

        def count(parts: list[Part]) -> StageRecord:
            return StageRecord(age=stages.age(parts, self.start[1])) if self.config.rollout.ahead else StageRecord()

        total = sum(part.rows for part in prompts) * self.config.rollout.samples
        parts = self.stage("completions", total, "samples", make, count)
        if age := self._record.stages["completions"].age:
            self.reporter.note(f"age of the completions, in steps: mean {age.mean:.1f}, most {age.most}")
        return parts

    def score(self, completions: Sequence[Part], rewards: "DeploymentHandle") -> list[Part]:
        window = stages.capacity(self.config.fleet.rewards)
        total = sum(part.rows for part in completions)
        judged = any(part.judge for part in self.config.reward.parts)

        def count(parts: list[Part]) -> StageRecord:
            return StageRecord(judge=stages.judged(parts)) if judged else StageRecord()

        make = functools.partial(stages.score, rewards, completions, window=window)
        parts = self.stage("scores", total, "samples", make, count)
        if tally := self._record.stages["scores"].judge:
            self.reporter.note(f"judge: {tally.text()}")
        return parts

    def best_against_worst(self, scores: Sequence[Part]) -> list[Part]:
        """Candidate pairs; prompts without a usable pair are dropped and counted."""
        controlled, fit = self.config.reward.length_controlled, None

        def make(out: StageOutput) -> list[Part]:
            nonlocal fit
            fit = stages.length_fit(scores) if controlled else None
            return stages.pair(scores, out, fit)

        def count(parts: list[Part]) -> StageRecord:
            record = StageRecord(dropped=stages.dropped(parts))
            return record.model_copy(update={"length_fit": fit}) if controlled else record

        parts = self.stage("candidates", None, "pairs", make, count)
        if controlled:
            fit = self._record.stages["candidates"].length_fit
            said = fit.text() if fit else "not corrected: no prompt has finished completions of different lengths"
            self.reporter.note(f"rewards and length: {said}")
        if dropped := self._record.stages["candidates"].dropped:
            self.reporter.note("no pair: " + ", ".join(f"{n} {reason}" for reason, n in dropped.items()))
        return parts

    def feedback(self) -> list[Part]:
        """Pairs from votes that came in before the round began; each is used in one round. Empty if that is off."""
        done, off = self._record.stages, not self.config.serve.feedback.keep_hours
        if "feedback" not in done and (off or "pairs" in done):  # turned on when the round had its pairs already
            return []
        before = [r.index for r in self.run.manifest.rounds[: self.index] if "feedback" in r.stages]
        earlier = [self.run.place.at("rounds", str(index), "feedback") for index in before]
        counts = StageRecord()

        def make(out: StageOutput) -> list[Part]:
            nonlocal counts
            tokenizer = self.run.place.at("tokenizer")
            counts = stages.feedback(out.folder, self.run.place, earlier, tokenizer, self.config.data)
            return parts_of(out.folder, counts.rows)

        parts = self.stage("feedback", None, "pairs", make, lambda parts: counts)
        left = ", ".join(f"{n} {reason}" for reason, n in done["feedback"].left.items())
        without = f" (without: {left})" if left else ""
        self.reporter.note(f"{sum(part.rows for part in parts)} pairs from feedback{without}")
        return parts

    def pairs(self, source: Sequence[Part], votes: Sequence[Part] = ()) -> list[Part]:
        """The round's pairs in training order, in parts of whole global batches; those from votes among them."""
        total, more = (sum(part.rows for part in parts) for parts in (source, votes))
        if not total + more:
            raise StageError(self._no_pairs())
        seed = self.config.run.seed
        order = Stream.PAIR_ORDER.generator(seed=seed, round=self.index).permutation(total)
        if self.config.rounds.data == "split":
            order = Stream.SPLIT.generator(seed=seed).permutation(total)
            order = np.array_split(order, self.config.rounds.count)[self.index]
        if more:
            order = np.concatenate([order, np.arange(total, total + more)])
            order = Stream.FEEDBACK_ORDER.generator(seed=seed, round=self.index).permutation(order)
        batch = self.config.optim.batch_size
        rows, both = -(-stages.PART_PAIRS // batch) * batch, [*source, *votes]
        return self.stage("pairs", len(order), "pairs", lambda out: reorder(both, order, out, rows))

    def _no_pairs(self) -> str:
        """Why the round has no pairs, with what to change about the most frequent reason."""
        candidates = self._record.stages.get("candidates", StageRecord())
        if not (dropped := candidates.dropped):
            return f"round {self.index + 1} has no preference pairs: there are no prompts; look at data.prompts"
        first = max(dropped, key=lambda reason: dropped[reason])
        advice = {
            "no finished completion": f"raise rollout.max_tokens={self.config.rollout.max_tokens}, or use a model that "
            "ends its answers",
            "only unfinished completions are better than the worst": "raise rollout.max_tokens="
            f"{self.config.rollout.max_tokens}, or look at what the reward source prefers",
            "completions without a reward": "look at why calls of the reward source fail",
        }.get(first, "look at the reward source, the prompts and rollout.temperature")
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        return f"round {self.index + 1} has no preference pairs ({reasons}); {advice}"

    def reference(self, pairs: Sequence[Part], references: "DeploymentHandle | None") -> list[Part]:
        """The pairs with token log-probs under the round's first policy; unchanged where no worker computes them."""
        if not self.config.reference_workers:
            return list(pairs)
        assert references is not None, "the fleet was started for a run without reference workers"

        def make(out: StageOutput) -> list[Part]:
            return stages.reference(references, pairs, out, self.start, self.run.versions, self.config, self.index)

        return self.stage("reference", sum(part.rows for part in pairs), "pairs", make)

    def train(self, pairs: Sequence[Part], trainer: "Trainer") -> Iterator[StepResult]:
        """Trains on the pairs from the last checkpoint on, and yields each step's result."""
        spec, index = self._spec(pairs), self.index
        steps = spec.steps
        if self._record.steps is None:
            self._record.steps = steps
            self.run.save()
        checkpoint = self.run.manifest.checkpoint
        done = checkpoint.step if checkpoint and checkpoint.round == index else 0
        if done == steps:  # all is trained and stored, but it was not exported
            done -= not is_complete(export_folder(self.run.place, index).url)
        started = time.monotonic()
        with self.reporter.stage("train", steps, "steps") as progress, LaterEpochs(spec) as epochs:
            progress.advance(done)
            epochs.resume(done, self._oldest_step)
            for step, result in enumerate(trainer.train(spec, done, epochs.check), start=1):
                self.seconds_left = (time.monotonic() - started) / step * (steps - done - step)
                epochs.reached(result.metrics.step, self._oldest_step)
                yield result
                progress.advance(1)
        self._record.stages["train"] = StageRecord(steps=steps, seconds=round(time.monotonic() - started, 2))

    def _spec(self, pairs: Sequence[Part]) -> RoundSpec:
        config, lengths = self.config, stages.lengths(pairs)
        steps = steps_in_round(len(lengths), config.optim.batch_size, config.rounds.epochs)
        numbers = self.index, self._record.start_version, steps
        in_order = has_parts_of_its_own(lengths, config.rounds.epochs)
        return RoundSpec(self.run.id, self.run.place, config, *numbers, tuple(pairs), ray.put(lengths), in_order)

    @property
    def _oldest_step(self) -> int:
        """The step that the older of the kept checkpoints was written after, where ranks may have to go back to."""
        kept = self.run.manifest.checkpoint, self.run.manifest.earlier
        return min(each.step if each and each.round == self.index else 0 for each in kept)

    def record(self, result: StepResult) -> None:
        """Records a step's metrics and what was stored; deletes versions and checkpoints that are replaced by that.
        TrainingError when the round's weights could not be exported, from which a resumed run goes on."""
        values = {**result.metrics.values, **self._record.figures}
        self.run.record(replace(result.metrics, values=values))
        self.reporter.metrics(result.metrics)
        for trouble in result.stored.troubles:
            self.reporter.note(trouble)
        for version in result.stored.published:
            self.reporter.version(version)
        if result.stored.published:
            self._prune_versions()
        for checkpoint in result.stored.checkpoints:
            self._take(checkpoint)
        self._overtaken += len(result.stored.overtaken)
        self._unwritten += len(result.stored.unwritten)
        if result.metrics.step == self._record.steps:
            self._note_unpublished()
        if result.unexported:
            raise TrainingError(result.unexported)

    def _note_unpublished(self) -> None:
        """At the round's end, how many versions it lacks and why."""
        if self._overtaken:
            self.reporter.note(
                f"{self._overtaken} versions of round {self.index + 1} were not published, as the one before was still "
                f"being written; raise publish.every_steps={self.config.publish.every_steps} to have them made evenly"
            )
        if self._unwritten:
            self.reporter.note(
                f"{self._unwritten} versions of round {self.index + 1} could not be written, which was said then; look "
                "at the storage of run.dir"
            )

    def _take(self, new: Checkpoint) -> None:
        """Names a complete checkpoint in the manifest, and deletes what it replaces: all that are earlier than it but
        the last of them, also those that ranks did not complete. Later ones may be being written."""
        manifest, at = self.run.manifest, (new.round, new.step)
        known = [each for each in (manifest.checkpoint, manifest.earlier) if each]
        # After a crash it may be one of them that was written again, or one before a damaged one.
        earlier = next((each for each in known if (each.round, each.step) < at), None)
        manifest.checkpoint, manifest.earlier = new, earlier
        self.run.save()
        kept = {Place(each.path).name for each in (new, earlier) if each}
        folder = self.run.place.at("checkpoints")
        for name in folder.names():
            numbers = CHECKPOINT.match(name)
            if numbers and name not in kept and (int(numbers[1]), int(numbers[2])) <= at:
                folder.at(name).remove()

    def commit(self) -> None:
        """Marks the round as finished. Its export, its last version and its checkpoint are durable by now."""
        self._record.committed = True
        self.run.save()
        self.folder.at("epochs").remove()

    def stage(
        self,
        name: str,
        total: int | None,
        unit: str,
        make: Callable[[StageOutput], list[Part]],
        count: Callable[[list[Part]], StageRecord] = lambda parts: StageRecord(),
    ) -> list[Part]:
        """A stage's parts: made and recorded, with what `count` adds, unless the manifest has the stage already."""
        folder = self.folder.at(name)
        if name in self._record.stages:
            return parts_of(folder, self._record.stages[name].rows)
        started = time.monotonic()
        with self.reporter.stage(name, total, unit) as progress:
            parts = make(StageOutput(folder, progress.advance))
            counts = count(parts)
        figures = {"rows": [part.rows for part in parts], "seconds": round(time.monotonic() - started, 2)}
        self._record.stages[name] = counts.model_copy(update=figures)
        self.run.save()
        return parts

    def seconds_of(self, name: str) -> float:
        """How long a finished stage took."""
        return self._record.stages[name].seconds or 0.0

    def note_stage(self, name: str, record: StageRecord) -> None:
        """Records a stage that has no parts."""
        self._record.stages[name] = record
        self.run.save()

    def _prune_versions(self) -> None:
        """Keeps the base, the first and last versions of rounds, the last `publish.keep`, and those that are served."""
        try:
            served = read_serving(self.run.place).kept()
        except (VersionError, OSError) as error:  # trouble with what is served is none of the training's
            self.reporter.note(f"no version is removed, since it is not known which are served: {error}")
            return
        records = self.run.manifest.rounds
        kept = {0} | {r.start_version for r in records} | {r.end_version for r in records}
        others = [v for v in complete_versions(self.run.versions.url) if v not in kept]
        for version in set(others[: -self.config.publish.keep]) - served:
            remove_version(version_folder(self.run.versions.url, version))
