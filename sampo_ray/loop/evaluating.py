"""Evaluation within a run: the base, and each version that ends a round, answer the same probe prompts, which are not
trained on. The stages are those of rounds: what is stored is not asked again."""

import hashlib
import time
from collections import Counter
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray

from sampo_ray.config.columns import Columns
from sampo_ray.data.rewards import Samples
from sampo_ray.errors import RewardError, StageError
from sampo_ray.evaluation import probe
from sampo_ray.evaluation.probe import Answer
from sampo_ray.evaluation.records import Conditions, TaskResult, read_result, result_place, subject_of, write_result
from sampo_ray.evaluation.verifiers import followed_in
from sampo_ray.judging.tally import Tally
from sampo_ray.loop import stages, tokenizing
from sampo_ray.loop.blocks import StageOutput, collect, of_each, run_stage
from sampo_ray.loop.reorder import reorder
from sampo_ray.loop.rounds import Reporter, Round
from sampo_ray.loop.tokenizing import Tokenizing, tasks_at_once
from sampo_ray.run.directory import Run
from sampo_ray.run.manifest import StageRecord, lineage
from sampo_ray.run.parts import Part, parts_of
from sampo_ray.run.serving import edit_serving, fall_back
from sampo_ray.run.storage import Place
from sampo_ray.sources.probing import completed
from sampo_ray.sources.source import Source
from sampo_ray.training.streams import Stream, rollout_seed

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from sampo_ray.loop.fleet import Fleet

TRAINED, TWICE, TOO_LONG = "also trained on", "there twice", "no room for an answer"
BASE, ANSWERS, SCORES, PROBE = "base_answers", "answers", "probe_scores", "probe"
"""Stages of a round."""


class Evaluation:
    """The evaluations of a run, if it makes any."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self.run, self.reporter, self.config = run, reporter, run.config
        self._on, self._folder = run.config.evaluates, run.place.at("held-out")

    def hold_out(self, data: Sequence[Part]) -> list[Part]:
        """Chooses the probe prompts, once, and returns the data without them: what rounds train on."""
        found = self.run.manifest.data
        if not self._on:
            return list(data)
        if not found.probe:
            named = self.config.evaluate.prompts
            with self.reporter.stage("probe prompts", None, "prompts"):
                (self._of_file(named, data) if named else self._of_data(data))
            self.run.save()
        dropped = "".join(f", {n} dropped: {reason}" for reason, n in found.probe_dropped.items())
        self.reporter.note(f"{sum(found.probe)} probe prompts{dropped}")
        return list(data) if found.rest is None else parts_of(self._folder.at("rest"), found.rest)

    def of_base(self, round: Round, fleet: "Fleet") -> None:
        """Evaluates the base, before the first round."""
        if self._on and round.index == 0:
            fleet.give_gpus("engines")
            self._answers(round, BASE, 0, fleet)
            self._result(round, 0, [BASE], fleet.rewards)

    def of_round(self, round: Round, fleet: "Fleet") -> None:
        """Evaluates the version that a round ends with, and decides what follows. StageError where it has collapsed
        and the run is to stop."""
        if not self._on:
            return
        if round.probed is None:
            fleet.give_gpus("engines")
            self._answers(round, ANSWERS, round.end[1], fleet)
            result = self._result(round, round.end[1], [BASE, ANSWERS], fleet.rewards)
            before = _stored(self.run.place, round.start[1])
            self._decide(round, probe.collapse(self.config.evaluate.collapse, result, before))
        if round.probed is not None and round.probed.fell_back:
            self._fall_back(round, round.probed.collapsed or "")

    def _decide(self, round: Round, collapsed: str | None) -> None:
        what = self.config.evaluate.on_collapse
        if collapsed is not None:
            self.reporter.note(f"the version of round {round.index + 1} has collapsed: {collapsed}")
            if what == "stop":
                raise StageError(
                    f"round {round.index + 1} ended with a version that has collapsed ({collapsed}); lower "
                    "optim.learning_rate or look at the reward source, and begin anew, or resume with "
                    "evaluate.on_collapse=continue or 'fall back'"
                )
        falls = collapsed is not None and what == "fall back"
        round.note_stage(PROBE, StageRecord(collapsed=collapsed, fell_back=falls))

    def _fall_back(self, round: Round, reason: str) -> None:
        """The version before is the run's final one, and what came after it is not served."""
        (_, good), (_, end) = round.start, round.end
        refused = dict.fromkeys(range(good + 1, end + 1), f"round {round.index + 1} fell back: {reason}")
        edit_serving(self.run.place, partial(fall_back, to=good, refused=refused), self.config.serve.follow)
        self.reporter.note(
            f"the run ends with version {good}, that round {round.index + 1} started from, as its final one"
        )

    def _of_data(self, data: Sequence[Part]) -> None:
        """Holds prompts out of the run's own, with all rows that have the same prompt."""
        found, keys, count = self.run.manifest.data, [key for key, _ in _keys(data)], self.config.evaluate.count
        order = Stream.PROBE.generator(seed=self.config.run.seed).permutation(len(keys))
        held, rest = held_out(keys, order.tolist(), count)
        if len(rest) < len(keys) / 2:
            raise StageError(
                f"evaluate.count={count} would hold out {len(keys) - len(rest)} of the {len(keys)} prompts of "
                "data.prompts; make it smaller, or name a file as evaluate.prompts"
            )
        found.probe = self._write(data, held)
        parts = reorder(data, np.array(rest, np.int64), StageOutput(self._folder.at("rest")), stages.PART_PAIRS)
        found.rest = [part.rows for part in parts]

    def _of_file(self, named: str, data: Sequence[Part]) -> None:
        """Takes prompts of a file, tokenized as the run's own, without those that are trained on."""
        config, folder = self.config, self._folder.at("source")
        sources = completed([Source(named, Columns(), "probe/")], "prompts")
        what = Tokenizing("prompts", sources, config.run.seed, self.run.place.at("tokenizer"), config.limits)
        with self.reporter.stage("tokenize probe", None, "rows") as progress:
            record = tokenizing.tokenize(what, folder, progress)
        parts = parts_of(folder, record.rows)
        rows, dropped = not_trained_on(
            _keys(parts), {key for key, _ in _keys(data)}, config.data.max_length - config.probe_tokens
        )
        if not rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
            raise StageError(
                f"evaluate.prompts={named!r}: none of its prompts can be used ({reasons}); name some that are not "
                "trained on and leave room for answers of evaluate.max_tokens"
            )
        self.run.manifest.data.probe = self._write(parts, rows[: config.evaluate.count])
        self.run.manifest.data.probe_dropped = {**record.dropped, **dropped}

    def _write(self, parts: Sequence[Part], rows: Sequence[int]) -> list[int]:
        made = reorder(parts, np.array(rows, np.int64), StageOutput(self._folder.at("prompts")), stages.PART_PROMPTS)
        return [part.rows for part in made]

    @property
    def _prompts(self) -> list[Part]:
        return parts_of(self._folder.at("prompts"), self.run.manifest.data.probe)

    def _answers(self, round: Round, stage: str, version: int, fleet: "Fleet") -> None:
        config, prompts = self.config, self._prompts
        drawing = {"samples": 1, "temperature": config.evaluate.temperature, "top_p": 1.0}
        rollout = config.rollout.model_copy(update={**drawing, "max_tokens": config.probe_tokens})
        seed, window = rollout_seed(config.run.seed, -1), stages.capacity(config.fleet.generators)

        def make(out: StageOutput) -> list[Part]:
            return stages.sample(fleet.generators, prompts, out, rollout, seed, (self.run.id, version), window)

        round.stage(stage, sum(part.rows for part in prompts), "samples", make)

    def _result(
        self, round: Round, version: int, subjects: Sequence[str], rewards: "DeploymentHandle | None"
    ) -> TaskResult:
        """The result of a version: stored already, or of its answers and those that they are compared with."""
        if (stored := read_result(result_place(self.run.place, subject_of(version), probe.TASK))) is not None:
            return stored
        own = self._parts_of(subjects, round)
        stage, total = SCORES if version else "base_scores", sum(part.rows for parts in own for part in parts)
        window = stages.capacity(self.config.fleet.rewards)
        parts = round.stage(stage, total, "samples", lambda out: _scored(own, rewards, out, window))
        rows = [row for part in of_each(parts, tasks_at_once(), _read) for row in part]
        base, previous, answers = (rows[at :: len(own)] for at in (0, max(0, len(own) - 2), len(own) - 1))
        others = (base, previous) if version else ()
        scores = probe.scores(answers, *others)
        result = TaskResult(
            task=probe.TASK,
            run=self.run.id,
            version=version,
            label=f"round-{round.index + 1}" if version else "base",
            model=lineage(self.config, None).base,
            scores=scores,
            conditions=self._conditions(answers, stages.judged(parts) if self._judged else Tally()),
            seconds=sum(round.seconds_of(name) for name in (subjects[-1], stage)),
            created=int(time.time()),
        )
        write_result(self.run.place, result, probe.as_jsonl(answers, *others))
        self.reporter.note(probe.line(result))
        self.run.log({f"probe/{score.name}": score.value for score in scores}, version)
        return result

    def _parts_of(self, subjects: Sequence[str], round: Round) -> list[list[Part]]:
        """The answers of base, of the version that the round started from, and of that it ended with; of the base once
        where it is the second, too."""
        if subjects == [BASE]:
            return [self._stored_answers(0, BASE)]
        before = [self._stored_answers(round.index - 1, ANSWERS)] if round.index else []
        return [self._stored_answers(0, BASE), *before, self._stored_answers(round.index, ANSWERS)]

    def _stored_answers(self, index: int, stage: str) -> list[Part]:
        record = self.run.manifest.rounds[index].stages[stage]
        return parts_of(self.run.place.at("rounds", str(index), stage), record.rows)

    @property
    def _judged(self) -> bool:
        return any(part.judge is not None for part in self.config.reward.parts)

    def _conditions(self, answers: Sequence[Answer], tally: Tally) -> Conditions:
        config, first = self.config, self._prompts[0].table()["prompt"][0].as_py()
        with self.run.place.at("tokenizer").on_disk() as folder:
            template, bos = _template(folder, first)
        notes = [] if config.scores else ["no reward source: no win rates"]
        return Conditions(
            total=len(answers),
            route="fleet",
            template=template,
            first_prompt=tuple(first),
            bos=bos,
            longest_prompt=max(len(ids) for part in self._prompts for ids in part.table()["prompt"].to_pylist()),
            max_tokens=config.probe_tokens,
            sampling={"temperature": config.evaluate.temperature, "top_p": 1.0},
            packages={name: version for name, version in self.run.manifest.packages.items() if version},
            seed=config.run.seed,
            empty=sum(answer.empty for answer in answers),
            cut=sum(answer.finish_reason != "stop" for answer in answers),
            failed=sum(answer.reward is None for answer in answers) if config.scores else 0,
            judge=probe.judged_by(config.reward, tally) if config.scores else None,
            notes=tuple(notes),
        )


def _template(folder: Path, prompt: Sequence[int]) -> tuple[str, int]:
    """Digest of a tokenizer's chat template, and how many tokens for the beginning of texts a prompt has."""
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.evaluation.subject import bos_in, template_digest

    chat = ChatFormat.load(folder, "tokenizer")
    return template_digest(chat), bos_in(prompt, chat)


def _stored(run: Place, version: int) -> TaskResult:
    found = read_result(result_place(run, subject_of(version), probe.TASK))
    assert found is not None, "versions are evaluated in order"
    return found


Key = bytes
"""A digest of a prompt as the model reads it."""


def held_out(keys: Sequence[Key], order: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Rows of `count` different prompts, the first in `order`; and the rows without any of these prompts."""
    held: dict[Key, int] = {}
    for row in order:
        if len(held) == count:
            break
        held.setdefault(keys[row], row)
    return [*held.values()], [row for row, key in enumerate(keys) if key not in held]


def not_trained_on(
    keys: Sequence[tuple[Key, int]], trained: Container[Key], room: int
) -> tuple[list[int], dict[str, int]]:
    """Rows of prompts that are not trained on, once each, and have at most `room` tokens; others are counted by reason.
    `keys` come with the prompts' tokens."""
    seen, rows, dropped = set[Key](), list[int](), Counter[str]()
    for row, (key, tokens) in enumerate(keys):
        reason = TRAINED if key in trained else TWICE if key in seen else TOO_LONG if tokens > room else None
        if reason is None:
            rows.append(row)
        else:
            dropped[reason] += 1
        seen.add(key)
    return rows, dict(dropped)


def _keys(parts: Sequence[Part]) -> list[tuple[Key, int]]:
    return [key for keys in of_each(parts, tasks_at_once(), _digests) for key in keys]


def _digests(table: pa.Table) -> list[tuple[Key, int]]:
    prompts = [np.array(ids, np.int32) for ids in table["prompt"].to_pylist()]
    return [(hashlib.blake2b(ids.tobytes(), digest_size=16).digest(), len(ids)) for ids in prompts]


@ray.remote(num_cpus=0.1)
def _together(scored: bool, *tables: pa.Table) -> pa.Table:
    """Answers of several versions to the same prompts, those to one prompt behind each other; `sample` counts them, so
    that a source which compares the completions of a prompt has all in one call."""
    n, k = tables[0].num_rows, len(tables)
    table = pa.concat_tables(tables).take(np.arange(n * k).reshape(k, n).T.ravel())
    at = table.schema.get_field_index("sample")
    table = table.set_column(at, "sample", pa.array(np.tile(np.arange(k, dtype=np.int32), n)))
    return table if scored else table.append_column("reward", pa.nulls(n * k, pa.float64()))


def _scored(
    subjects: Sequence[Sequence[Part]], rewards: "DeploymentHandle | None", out: StageOutput, window: int
) -> list[Part]:
    """SCORES of the answers of several versions, together; rewards are null without a source."""

    def start(index: int, place: Place, again: bool) -> ray.ObjectRef:
        table = _together.remote(rewards is not None, *(parts[index].argument(again) for parts in subjects))
        return collect.remote(place, table if rewards is None else stages.as_ref(rewards.score.remote(table)))

    return run_stage(out, window, len(subjects[0]), start)


def _read(table: pa.Table) -> list[Answer]:
    samples = Samples.of(table)
    try:
        follows = followed_in(table)
    except RewardError:  # without the verifiers, which was noted before the run started
        follows = [None] * table.num_rows
    ids, reasons, rewards = (table[name].to_pylist() for name in ("id", "finish_reason", "reward"))
    return [
        Answer(
            ids[at],
            samples.prompts[at][-1]["content"],
            text,
            len(samples.completion_ids[at]),
            reasons[at],
            rewards[at],
            follows[at],
        )
        for at, text in enumerate(samples.completions)
    ]
