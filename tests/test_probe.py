"""Evaluation within a run: what answers say of a version, when it has collapsed, and which prompts are held out."""

import json
import re
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampo_ray.actors.weights.gates import Probe, Verdict, evaluation_of, judge
from sampo_ray.config.evaluation import CollapseConfig
from sampo_ray.config.run import load_config
from sampo_ray.config.serving import GatesConfig
from sampo_ray.data.preferences import COMPLETIONS, PROMPTS
from sampo_ray.errors import ConfigError, StageError
from sampo_ray.evaluation import probe
from sampo_ray.evaluation.probe import Answer, collapse, scores
from sampo_ray.evaluation.records import Conditions, TaskResult, results_in, write_result
from sampo_ray.evaluation.subjects import read_results
from sampo_ray.judging.tally import Tally
from sampo_ray.loop import evaluating, stages
from sampo_ray.loop.evaluating import Evaluation, _together, held_out, not_trained_on
from sampo_ray.loop.rounds import Round, unfinished
from sampo_ray.run import serving
from sampo_ray.run.directory import create_run, open_run
from sampo_ray.run.manifest import Manifest, RoundRecord, StageRecord, lineage
from sampo_ray.run.parts import Part, parts_of
from sampo_ray.run.serving import Serving
from tests.in_process import in_process  # noqa: F401
from tests.notes import Notes


def answer(tokens=10, reward=0.0, reason="stop", text="yes", prompt="p", followed=None):
    return Answer(prompt, "Well?", text, tokens, reason, reward, followed)


rewards = st.none() | st.floats(-1e6, 1e6)
some = st.builds(answer, st.integers(1, 5000), rewards, st.sampled_from(["stop", "length"]), st.sampled_from(["", "a"]))
three = st.lists(st.tuples(some, some, some), min_size=1, max_size=40)


def result(answers, base=None, previous=None):
    found = scores(answers, base, previous)
    return TaskResult(
        task="probe",
        version=1,
        label="round-1",
        model="m",
        scores=found,
        conditions=Conditions(total=len(answers), route="fleet"),
        seconds=0,
        created=0,
    )


@given(three)
def test_scores_lie_in_their_intervals_and_win_rates_of_two_versions_add_up_to_one(rows):
    ours, base, previous = (list(column) for column in zip(*rows, strict=True))
    for score in scores(ours, base, previous):
        if score.low is not None:
            assert score.low - 1e-9 <= score.value <= score.high + 1e-9
        if score.unit == "share":
            assert 0 <= score.value <= 1
    one, other = result(ours, base, previous), result(previous, base, ours)
    a, b = (each.score(probe.WIN_RATE_PREVIOUS) for each in (one, other))
    assert (a is None) == (b is None)
    if a is not None:
        assert a.value + b.value == pytest.approx(1) and a.count == b.count
        assert a.low == pytest.approx(1 - b.high)


@given(three)
def test_the_base_alone_has_no_win_rates_and_every_probe_has_tokens_and_lost_answers(rows):
    names = {score.name for score in scores([row[0] for row in rows])}
    assert {probe.TOKENS, probe.LOST} <= names and not {probe.WIN_RATE_BASE, probe.WIN_RATE_PREVIOUS} & names


def test_no_win_rate_is_made_of_rewards_that_are_missing_for_many_prompts():
    worse, better = [answer(reward=0.0)] * 20, [answer(reward=1.0)] * 18
    assert result([*better, *[answer(reward=None)] * 2], worse, worse).score(probe.WIN_RATE_BASE) is None
    rate = result([*better, answer(reward=1.0), answer(reward=None)], worse, worse).score(probe.WIN_RATE_BASE)
    assert (rate.value, rate.count) == (1.0, 19)


def test_the_slope_is_what_a_further_token_gains():
    line = result([answer(tokens, reward=0.5 * tokens + 1) for tokens in (3, 5, 9, 40)]).score(probe.SLOPE)
    assert line.value == pytest.approx(0.5) and line.stderr == pytest.approx(0, abs=1e-9)


def test_instructions_are_counted_as_ifeval_does_over_all_prompts():
    given = [answer(followed=(True, False, True)), answer(followed=(False,)), answer()]
    assert (found := result(given).score(probe.FOLLOWED)).value == 0.5 and found.count == 4


def compared(now, before, **limits):
    return collapse(CollapseConfig(**limits), result(now, before, before), result(before, before, before))


@pytest.mark.parametrize(
    ("now", "before", "reason"),
    [
        (answer(reward=-1.0), answer(), "win rate of 0.000 .* below evaluate.collapse.win_rate=0.4"),
        (answer(tokens=21), answer(), "21.0 tokens after 10.0 .* beyond evaluate.collapse.growth=2"),
        (answer(tokens=4), answer(), "4.0 tokens after 10.0 .* beyond evaluate.collapse.growth=2"),
        (answer(text=" "), answer(), "rose from 0.00 to 1.00, above evaluate.collapse.lost=0.5"),
        (answer(reason="length"), answer(), "rose from 0.00 to 1.00, above evaluate.collapse.lost=0.5"),
    ],
)
def test_each_kind_of_collapse_is_named(now, before, reason):
    assert re.search(reason, compared([now] * 20, [before] * 20))


def test_what_is_no_collapse():
    good = [answer()] * 20
    assert compared(good, good) is None
    assert compared([answer(tokens=20)] * 20, good) is None
    assert compared([answer(reason="length")] * 20, [answer(reason="length")] * 20) is None, "nor was it before"
    assert compared([answer(reward=-1.0)] * 2, good[:2]) is None, "two prompts say little"
    assert compared([answer(reward=None)] * 20, good) is None


@given(three)
@settings(max_examples=30)
def test_the_decision_is_the_same_from_what_is_stored(rows):
    ours, base, previous = (list(column) for column in zip(*rows, strict=True))
    now, before = result(ours, base, previous), result(previous, base, base)
    read = [TaskResult.model_validate_json(each.model_dump_json()) for each in (now, before)]
    limits = CollapseConfig()
    assert collapse(limits, now, before) == collapse(limits, *read)
    assert probe.line(now)
    lines = [json.loads(each)["scores"] for each in probe.as_jsonl(ours, base, previous).decode().splitlines()]
    for score in now.scores:
        if score.name not in (probe.SLOPE, probe.FOLLOWED):
            assert score.value == pytest.approx(fmean(each[score.name] for each in lines if score.name in each))


MODEL = {"model": {"path": "m"}, "run": {"dir": "r"}}
ONLINE = {"data": {"prompts": "p"}, "rounds": {"mode": "online"}, "reward": {"function": "a:b"}}
ROUND = {"every": "round"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"train": "t"}, "evaluate": ROUND}, "evaluate.prompts is missing; rounds.mode=offline"),
        ({"data": {"train": "t"}, "evaluate": {**ROUND, "prompts": "t"}}, "evaluate.prompts='t' is data.train, too"),
        ({**ONLINE, "evaluate": {"prompts": "q"}}, "evaluate.prompts='q' is not used with evaluate.every=never"),
        ({**ONLINE, "evaluate": {**ROUND, "max_tokens": 2000}}, "more than rollout.max_tokens=1024"),
        ({**ONLINE, "evaluate": {**ROUND, "max_tokens": 9000}}, "leaves no room for a prompt"),
        ({**ONLINE, "evaluate": {**ROUND, "count": 3}}, "evaluate.count: .* greater than or equal to 8"),
        ({**ONLINE, "evaluate": {"every": "step"}}, "evaluate.every"),
        ({**ONLINE, "evaluate": {**ROUND, "collapse": {"growth": 1}}}, "evaluate.collapse.growth"),
        ({**ONLINE, "serve": {"gates": {"probe": True}}}, "serve.gates.probe needs the evaluation"),
        ({**ONLINE, "evaluate": ROUND, "serve": {"gates": {"probe": True}}}, "needs serve.follow=round, not latest"),
        ({"data": {"train": "t"}, "serve": {"gates": {"verifiers": 0.1}}}, "serve.gates.verifiers needs prompts"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(tree, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_config({**MODEL, **tree})
    assert len(str(raised.value).splitlines()) == 1


def test_a_recipe_with_prompts_held_out_is_another_one_and_one_with_a_file_is_not():
    plain, held = ({**MODEL, **ONLINE, "evaluate": evaluate} for evaluate in ({}, ROUND))
    filed = {**held, "evaluate": {**ROUND, "prompts": "q"}}
    recipes = [lineage(load_config(tree), None).recipe for tree in (plain, held, filed)]
    assert recipes[0] == recipes[2] != recipes[1]


def test_who_scored_is_recorded_and_only_what_repeats_itself_has_no_spread():
    judge = {"url": "http://127.0.0.1:1/v1", "model": "j", "preset": "summary"}
    online = load_config({**MODEL, **ONLINE}).reward
    judged = load_config({**MODEL, **ONLINE, "reward": {"sum": [{"judge": judge}, {"function": "a:b"}]}}).reward
    assert probe.judged_by(online, Tally()).repeat_spread == 0.0
    record = probe.judged_by(judged, Tally(calls=3, refused=1))
    assert (record.name, record.preset, record.tally.calls, record.tally.refused) == ("j + a:b", "summary", 3, 1)
    assert record.repeat_spread is None
    assert probe.judged_by(load_config({**MODEL, "data": {"train": "t"}}).reward, Tally()) is None


def test_the_defaults_evaluate_nothing_and_answers_fit():
    assert not load_config({**MODEL, **ONLINE}).evaluates
    offline = load_config({**MODEL, "data": {"train": "t", "max_length": 256}, "evaluate": {**ROUND, "prompts": "q"}})
    assert offline.evaluates and offline.probe_tokens == 64 and not offline.scores


def test_a_version_is_promoted_only_after_its_round_was_evaluated_without_a_collapse():
    ended = RoundRecord(index=0, start_version=0, steps=4)
    manifest = Manifest(id="r", rounds=[ended])
    assert evaluation_of(manifest, 4) is None and evaluation_of(manifest, 3) is None
    ended.stages["probe"] = StageRecord(collapsed=None, fell_back=False)
    assert evaluation_of(manifest, 4) == Verdict(True)
    ended.stages["probe"] = StageRecord(collapsed="it grew", fell_back=False)
    assert evaluation_of(manifest, 4) == Verdict(False, "it grew")


def test_a_gate_refuses_a_version_that_follows_fewer_instructions():
    gates = GatesConfig(verifiers=0.1)
    before = Probe([1], [True], (), [True] * 9 + [False])
    same, worse = (replace(before, followed=[True] * n + [False] * (10 - n)) for n in (8, 7))
    assert gates.probing and judge(gates, same, before).passed and judge(gates, worse, None).passed
    assert "fell from 0.900 to 0.700, by more than verifiers=0.1" in judge(gates, worse, before).reason


def test_after_a_fall_back_the_good_version_is_live_and_final_and_the_others_are_refused():
    labels = {0: ["base"], 4: ["round-1"], 8: ["round-2", "final"]}
    state = Serving(live=8, sequence=3, passed=[0, 4, 8])
    after = serving.fall_back(state, 4, {8: "bad"})
    assert (after.live, after.sequence, after.refused) == (4, 4, {8: "bad"})
    assert serving.newest_passed(after, labels) == 4 and serving.accept(after, 8, labels[8]) == after
    assert serving.fall_back(after, 4, {8: "bad"}) == after
    assert serving.fall_back(Serving(live=0), 4, {8: "bad"}).live == 0, "an operator's choice stays"
    infos = {v: serving.VersionInfo(version=v, round=0, step=v, created=0, labels=names) for v, names in labels.items()}
    assert [v for v, names in serving.all_labels(after, infos).items() if "final" in names] == [4]


keys = st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), min_size=1, max_size=30)


@given(keys, st.integers(1, 8), st.randoms())
def test_prompts_that_are_held_out_differ_and_none_of_the_rest_has_one_of_them(keys, count, random):
    order = list(range(len(keys)))
    random.shuffle(order)
    held, rest = held_out(keys, order, count)
    assert len({keys[row] for row in held}) == len(held) == min(count, len(set(keys)))
    assert sorted([*rest, *(row for row in order if keys[row] in {keys[h] for h in held})]) == list(range(len(keys)))


@given(keys, st.sets(st.sampled_from([b"a", b"b", b"c"])), st.integers(0, 9))
def test_probe_prompts_of_a_file_are_not_trained_on_and_what_is_left_out_is_counted(keys, trained, room):
    sized = [(key, key[0] % 10) for key in keys]
    rows, dropped = not_trained_on(sized, trained, room)
    assert not {keys[row] for row in rows} & trained and len({keys[row] for row in rows}) == len(rows)
    assert all(sized[row][1] <= room for row in rows)
    assert len(rows) + sum(dropped.values()) == len(keys)


def prompts(place, texts):
    rows = [
        (str(n), '[{"role": "user", "content": "?"}]', "{}", [ord(letter) for letter in text])
        for n, text in enumerate(texts)
    ]
    table = pa.Table.from_pylist([dict(zip(PROMPTS.names, row, strict=True)) for row in rows], schema=PROMPTS)
    halves = [table.slice(0, 5), table.slice(5)]
    for part, half in zip(parts_of(place, [5, len(texts) - 5]), halves, strict=True):
        part.place.write_table(half)
    return parts_of(place, [5, len(texts) - 5])


@pytest.fixture
def online(tmp_path):
    tree = {**ONLINE, "model": {"path": "m"}, "run": {"dir": str(tmp_path / "run")}}
    return create_run(load_config({**tree, "evaluate": {**ROUND, "count": 8}}))


@pytest.mark.usefixtures("in_process")
def test_a_run_trains_on_none_of_the_prompts_that_it_holds_out_and_chooses_them_once(online):
    texts = [chr(97 + n % 20) for n in range(24)]
    data = prompts(online.place.at("data"), texts)
    rest = Evaluation(online, notes := Notes()).hold_out(data)
    held = pa.concat_tables([part.table() for part in Evaluation(online, notes)._prompts])
    trained = pa.concat_tables([part.table() for part in rest])
    asked, learned = ({*map(tuple, table["prompt"].to_pylist())} for table in (held, trained))
    assert len(asked) == 8 and not asked & learned
    assert "8 probe prompts" in notes.notes
    again = Evaluation(open_run(online.place.url), Notes()).hold_out(data)
    assert [part.rows for part in again] == [part.rows for part in rest]
    with pytest.raises(StageError, match="evaluate.count=8 would hold out 8 of the 10 prompts of data.prompts"):
        online.manifest.data.probe = []
        Evaluation(online, Notes()).hold_out(prompts(online.place.at("few"), [chr(97 + n) for n in range(10)]))


@pytest.mark.usefixtures("in_process")
def test_prompts_of_a_file_that_are_also_trained_on_are_left_out_and_said(tmp_path, monkeypatch):
    (tmp_path / "probe.jsonl").write_text('{"prompt": "a"}')
    evaluate = {**ROUND, "prompts": str(tmp_path / "probe.jsonl"), "max_tokens": 8}
    tree = {**MODEL, "run": {"dir": str(tmp_path / "run")}, "data": {"train": "t", "max_length": 16}}
    run = create_run(load_config({**tree, "evaluate": evaluate}))
    asked = ["a", "bb", "c", "c", "d" * 9, "e"]

    def tokenize(what, place, progress):
        assert (what.kind, what.data) == ("prompts", run.config.limits)
        return StageRecord(rows=[part.rows for part in prompts(place, asked)], dropped={"empty prompt": 2})

    monkeypatch.setattr("sampo_ray.loop.tokenizing.tokenize", tokenize)
    data = prompts(run.place.at("data"), ["a", "x", "y", "z", "a", "w"])
    notes = Notes()
    assert Evaluation(run, notes).hold_out(data) == data
    held = pa.concat_tables([part.table() for part in Evaluation(run, notes)._prompts])
    assert held["prompt"].to_pylist() == [[98, 98], [99], [101]]
    dropped = {"empty prompt": 2, "also trained on": 1, "there twice": 1, "no room for an answer": 1}
    assert run.manifest.data.probe_dropped == dropped
    assert "3 probe prompts, 2 dropped: empty prompt, 1 dropped: also trained on" in notes.notes[0]
    asked[:] = ["a"] * 6
    run.manifest.data.probe = []
    with pytest.raises(StageError, match=r"none of its prompts can be used \(6 also trained on\); name some"):
        Evaluation(run, Notes()).hold_out(data)


def test_a_run_that_does_not_evaluate_trains_on_all_of_its_data_as_it_is(online):
    config = online.config.model_copy(update={"evaluate": load_config({**MODEL, **ONLINE}).evaluate})
    online.config = config
    data = parts_of(online.place.at("data"), [5, 3])
    assert Evaluation(online, Notes()).hold_out(data) == data
    assert "probe" not in online.manifest.data.model_dump()


@pytest.mark.parametrize(("what", "ends"), [("continue", False), ("stop", False), ("fall back", True)])
def test_what_follows_a_collapse_is_recorded_once_and_the_same_after_a_crash(online, what, ends):
    evaluate = online.config.evaluate.model_copy(update={"on_collapse": what})
    online.config = online.config.model_copy(update={"evaluate": evaluate})
    round = Round(online, 0, notes := Notes())
    evaluation = Evaluation(online, notes)
    if what == "stop":
        for _ in range(2):
            with pytest.raises(StageError, match=r"round 1 ended with a version that has collapsed \(it grew\)"):
                evaluation._decide(round, "it grew")
        assert round.probed is None
        return
    evaluation._decide(round, "it grew")
    assert (round.probed.collapsed, round.probed.fell_back) == ("it grew", ends)
    assert "the version of round 1 has collapsed: it grew" in notes.notes
    round.commit()
    left = [each.index for each in unfinished(open_run(online.place.url, online.config), Notes())]
    assert left == ([] if ends else [1, 2])


class Generators:
    """In place of a fleet: answers of `lengths[version]` tokens, and what was asked of which version."""

    def __init__(self, lengths):
        self.lengths, self.asked, self.rewards = lengths, [], None

    def give_gpus(self, turn):
        assert turn == "engines"

    def generators(self, version):
        return SimpleNamespace(generate=SimpleNamespace(remote=self.generate))

    def generate(self, block, rows, request):
        version, taken = request.weights.version, block.take(list(rows))
        assert (request.samples, request.temperature) == (1, 0.0)
        self.asked.append(version)
        n, length = taken.num_rows, self.lengths[version]
        answer = [0, [1] * length, "So.", "stop", [0.0] * length, version, version]
        made = zip(answer, list(COMPLETIONS)[4:], strict=True)
        columns = [*taken.columns, *(pa.array([each] * n, field.type) for each, field in made)]
        return pa.Table.from_arrays(columns, schema=COMPLETIONS)


@pytest.fixture
def without_ray(monkeypatch):
    def keep(place, *tables):
        place.write_table(table := pa.concat_tables(tables))
        return table.num_rows

    for module in (evaluating, stages):
        monkeypatch.setattr(module, "collect", SimpleNamespace(remote=keep))
    monkeypatch.setattr(evaluating, "_together", SimpleNamespace(remote=_together._function))
    monkeypatch.setattr(evaluating, "_template", lambda folder, prompt: ("t", 1))
    monkeypatch.setattr(stages, "as_ref", lambda made: made)
    monkeypatch.setattr(Part, "argument", lambda part, again=False: part.table())


@pytest.mark.usefixtures("in_process", "without_ray")
def test_each_version_is_asked_once_and_two_rounds_without_rewards_are_told_apart_by_tokens(online):
    online.place.at("tokenizer", "x").write(b"")
    fleet, notes = Generators({0: 10, 4: 12, 8: 30}), Notes()
    evaluation = Evaluation(online, notes)
    evaluation.hold_out(prompts(online.place.at("data"), [chr(97 + n) for n in range(24)]))
    for index in range(2):
        round = Round(online, index, notes)
        evaluation.of_base(round, fleet)
        online.manifest.rounds[index].steps = 4
        for _ in range(2):  # as after a crash
            evaluation.of_round(Round(online, index, notes), fleet)
        round.commit()
    assert set(fleet.asked) == {0, 4, 8} and len(fleet.asked) == 3
    base, first, second = sorted(results_in(online.place), key=lambda each: each.version)
    assert [each.score("mean_tokens").value for each in (base, first, second)] == [10, 12, 30]
    assert not {score.name for score in second.scores} & {"win_rate_base", "mean_reward"}
    collapsed = [record.probed.collapsed for record in online.manifest.rounds]
    assert collapsed[0] is None and "30.0 tokens after 12.0" in collapsed[1]
    assert second.conditions.total == 8 and second.label == "round-2"
    assert sum(note.startswith("probe of ") for note in notes.notes) == 3


def test_the_version_that_a_run_fell_back_from_does_not_stand_for_it(online):
    online.manifest.rounds = [
        RoundRecord(index=0, start_version=0, steps=4, committed=True),
        RoundRecord(index=1, start_version=4, steps=4, committed=True),
    ]
    for version in (0, 4, 8):
        write_result(online.place, result([answer()] * 3).model_copy(update={"version": version}), b"")
    for fell_back, shown in ((False, 8), (True, 4)):
        online.manifest.rounds[1].stages["probe"] = StageRecord(collapsed="it grew", fell_back=fell_back)
        online.save()
        assert read_results(online.place.url).shown.version == shown
        assert online.finish().name == ("round-1" if fell_back else "round-2")


def test_answers_to_a_prompt_are_behind_each_other():
    zeros = pa.array([0, 0], pa.int32())
    tables = [pa.table({"id": ["p", "q"], "sample": zeros, "text": texts}) for texts in (["a", "b"], ["c", "d"])]
    rows = _together._function(False, *tables).to_pylist()
    assert [(row["id"], row["text"], row["sample"]) for row in rows] == [
        *(("p", "a", 0), ("p", "c", 1)),
        *(("q", "b", 0), ("q", "d", 1)),
    ]
