"""Which version is live: the pure state, its file, and the commands on it."""

import json
import threading
import time

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sampo_ray.actors.weights.gates import Probe, judge, win_rate
from sampo_ray.actors.weights.pinned import pinned_app, pins_of
from sampo_ray.config.run import load_config
from sampo_ray.config.serving import GatesConfig, ServeConfig
from sampo_ray.errors import VersionError
from sampo_ray.run import commands, serving, versions
from sampo_ray.run.directory import create_run
from sampo_ray.run.manifest import lineage
from sampo_ray.run.report import PinState, Report, Trouble, report_place
from sampo_ray.run.serving import Adapter, Serving, read_serve_config
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import AdaptersInfo, VersionInfo, version_folder

INFOS = {
    0: VersionInfo(version=0, round=0, step=0),
    5: VersionInfo(version=5, round=0, step=5, labels=versions.labels_of(0, 5, False, 2)),
    8: VersionInfo(version=8, round=0, step=8, labels=versions.labels_of(0, 8, True, 2)),
    12: VersionInfo(version=12, round=1, step=4, labels=versions.labels_of(1, 4, True, 2)),
}
LABELS = serving.all_labels(Serving(), INFOS)


def published(state: Serving) -> Serving:
    for version, labels in LABELS.items():
        state = serving.accept(state, version, labels)
    return state


def test_versions_have_the_labels_of_their_place_in_the_run():
    assert LABELS == {
        0: ["base"],
        5: ["round-1/step-5"],
        8: ["round-1/step-8", "round-1"],
        12: ["round-2/step-4", "round-2", "final"],
    }
    assert [versions.find(name, LABELS) for name in ("base", "5", "round-1", "final", "round-2/step-4")] == [
        0, 5, 8, 12, 12,
    ]  # fmt: skip
    with pytest.raises(VersionError, match=r"no version '7' is kept; there is 0 \(base\), 5 \(round-1/step-5\), 8"):
        versions.find("7", LABELS)


@pytest.mark.parametrize(("follow", "live"), [("latest", 12), ("round", 12), ("manual", 0)])
def test_what_goes_live_by_itself_is_what_the_policy_follows(follow, live):
    state = published(Serving(follow=follow))
    assert state.live == live
    before = {"latest": [0, 5, 8], "round": [0, 8], "manual": []}[follow]
    assert state.previous == before and state.sequence == len(before) + 1


def test_a_version_held_by_hand_stays_until_training_is_followed_again():
    state = serving.rollback(published(Serving()))
    assert (state.live, state.held) == (8, True)
    assert serving.accept(state, 20, ["round-3"]).live == 8
    state = commands.apply(state, INFOS, commands.Promote("latest"))
    assert (state.live, state.held) == (12, False)
    state = commands.apply(state, INFOS, commands.Promote("base"))
    assert (state.live, state.held) == (0, True)
    assert serving.rollback(state).live == 12


def test_a_refused_version_is_listed_with_its_reason_and_cannot_be_promoted():
    state = serving.refuse(published(Serving(follow="round")), 5, "too long")
    entry = next(e for e in serving.listing(state, INFOS) if e.version == 5)
    assert (entry.state, entry.reason) == ("refused", "too long")
    with pytest.raises(VersionError, match="version 5 was refused: too long"):
        commands.apply(state, INFOS, commands.Promote("5"))
    (base,) = serving.listing(state, {0: INFOS[0].model_copy(update={"files": {"a": "xxh3"}})})
    assert base.listed() == {"version": 0, "round": 0, "step": 0, "labels": ("base",), "state": "kept", "reason": None}


def test_pins_labels_and_what_retention_leaves():
    state = commands.apply(published(Serving()), INFOS, commands.Pin("round-1"))
    state = commands.apply(state, INFOS, commands.Label("5", "blue"))
    assert state.pinned == [8] and state.kept() == {12, 8, 5}
    assert versions.find("blue", serving.all_labels(state, INFOS)) == 5
    with pytest.raises(VersionError, match=r"version 5 is not pinned \(pinned: 8\)"):
        commands.apply(state, INFOS, commands.Unpin("5"))
    assert commands.apply(state, INFOS, commands.Unpin("8")).pinned == []
    for bad in ("final", "round-9", "Blue", "", "a b", "7", "a/b", "..", "a/../../x", ".a", "a\n", "a" * 65):
        with pytest.raises(VersionError, match="label"):
            commands.apply(state, INFOS, commands.Label("5", bad))


@given(
    st.lists(st.sampled_from(["publish", "promote", "rollback", "pin", "unpin", "release", "refuse"]), max_size=40),
    st.data(),
)
def test_the_sequence_grows_with_every_change_of_what_is_live_and_only_then(commands, data):
    state, newest = serving.accept(Serving(), 0, ["base"]), 0
    for command in commands:
        before = state
        some = data.draw(st.integers(0, newest))
        try:
            if command == "publish":
                newest += data.draw(st.integers(1, 3))
                state = serving.accept(state, newest, [])
            elif command == "release":
                state = serving.release(state, newest)
            elif command == "rollback":
                state = serving.rollback(state)
            elif command == "refuse":
                state = serving.refuse(state, some, "why")
            else:
                state = {"promote": serving.promote, "pin": serving.pin, "unpin": serving.unpin}[command](state, some)
        except VersionError:
            assert state == before
        assert state.sequence - before.sequence == (state.live != before.live)
        backwards = state.live < before.live
        assert not backwards or command in ("rollback", "promote", "release"), "only an operator goes backwards"
        assert state.live in state.kept()


def test_adapters_are_served_on_the_version_they_were_made_for():
    state = serving.add_adapter(published(Serving()), "tune", Adapter(base=8, rank=12))
    assert state.all_pinned == [8] and state.kept() >= {8}
    with pytest.raises(VersionError, match="carries adapters .tune."):
        serving.unpin(state, 8)
    for refused in (
        lambda: serving.add_adapter(state, "tune", Adapter(base=0, rank=8)),
        lambda: serving.label(state, 5, "tune"),
    ):
        with pytest.raises(VersionError, match="tune"):
            refused()
    with pytest.raises(VersionError, match="there is no adapter 'other'; there is tune"):
        serving.remove_adapter(state, "other")
    assert serving.remove_adapter(state, "tune").all_pinned == [], "it was pinned for the adapter alone"
    assert serving.unpin(serving.remove_adapter(serving.pin(state, 8), "tune"), 8).all_pinned == []


def test_adapters_that_come_and_go_move_nothing_else_to_another_application():
    alone = serving.pin(Serving(), 8)
    assert pins_of(alone) == {8: (8, 0)} and pinned_app("f", "r1", (8, 0)) == "f-pinned-r1-8"
    state = serving.add_adapter(alone, "tune", Adapter(base=8, rank=12))
    assert pins_of(state) == {8: (8, 0), "tune": (8, 16)} and pinned_app("f", "r1", (8, 16)) == "f-pinned-r1-8-lora16"
    state = serving.add_adapter(state, "first", Adapter(base=0, rank=33))
    assert pins_of(state)[0] == pins_of(state)["first"] == (0, 64), "a version that is pinned for adapters shares"
    for name, rank, group in (("small", 1, 16), ("same", 64, 64), ("large", 65, 256), ("largest", 512, 512)):
        after = serving.add_adapter(state, name, Adapter(base=0, rank=rank))
        assert pins_of(after) == {**pins_of(state), name: (0, group)}
        assert pins_of(serving.remove_adapter(after, name)) == pins_of(state)
        state = after
    again = Serving.model_validate_json(state.model_dump_json())
    assert pins_of(again) == pins_of(state), "also when the state is read again"


def test_a_version_of_adapters_alone_is_pinned_on_its_base():
    adapters = AdaptersInfo(base=0, rank=4, scaling=2.0)
    infos = {**INFOS, 5: INFOS[5].model_copy(update={"adapters": adapters})}
    state = commands.apply(published(Serving()), infos, commands.Pin("5"))
    assert (state.all_pinned, state.pinned_adapters, pins_of(state)) == ([0, 5], {5}, {0: (0, 16), 5: (0, 16)})
    assert state.kept() >= {0, 5}
    for pin in (PinState(state="pinned"), PinState(state="failing", reason="no memory")):
        states = {e.version: (e.state, e.reason) for e in serving.listing(state, infos, {5: pin})}
        assert states[5] == (pin.state, pin.reason) and states[0] == ("pinned", None)
    with pytest.raises(VersionError, match="version 0 carries adapters .5."):
        serving.unpin(state, 0)
    with pytest.raises(VersionError, match=r"version 8 is not pinned \(pinned: 0, 5\)"):
        serving.unpin(state, 8)
    state = commands.apply(state, infos, commands.Unpin("5"))
    assert (state.adapters, state.all_pinned) == ({}, [])


def test_a_run_that_is_taken_up_again_serves_what_is_durable():
    assert serving.resume(Serving(), LABELS, checked=False).live == 12
    assert serving.resume(Serving(), LABELS, checked=True).live == 0
    held = serving.promote(published(Serving()), 5)
    assert serving.resume(held, LABELS, checked=False) == held
    gone = {version: names for version, names in LABELS.items() if version != 5}
    for checked in (False, True):
        assert serving.resume(held, gone, checked).live == 12
    refused = serving.refuse(serving.resume(Serving(), {0: ["base"]}, checked=True), 12, "why")
    assert serving.resume(refused, LABELS, checked=False).live == 8


def test_of_versions_that_could_not_go_live_before_only_the_last_does():
    state = serving.accept(Serving(), 0, ["base"])
    state = serving.accept_all(state, {version: LABELS[version] for version in (5, 8, 12)})
    assert (state.live, state.previous, state.passed) == (12, [0], [0, 5, 8, 12])
    assert serving.rollback(state).live == 0, "what was live before"


def test_what_is_known_of_checks_is_kept_for_versions_that_exist_and_a_few_more():
    state, on_disk = Serving(), {0, 3, 7, 900}
    for version in range(1000):
        state = serving.trim(serving.refuse(serving.accept(state, version, []), version, "too long"), on_disk)
    assert {0, 3, 7, 900} < set(state.refused) and len(state.refused) == 4 + serving.HISTORY
    assert {0, 3, 7, 900} < set(state.passed) and len(state.passed) == 4 + serving.HISTORY
    with pytest.raises(VersionError, match="version 3 was refused"):
        serving.promote(state, 3)


def test_a_version_that_is_being_checked_is_kept():
    assert published(Serving(checking=5)).kept() == {5, 8, 12}


@pytest.mark.parametrize(
    "name",
    ["policy", "live", "training", "latest", "base", "final", "round-1", "round-9/step-3", "16", "007", "p@1", "p#1"],
)
def test_no_name_of_an_adapter_or_a_label_is_one_that_something_else_is_served_by(name):
    for taken in (
        lambda: serving.add_adapter(Serving(), name, Adapter(base=0, rank=8)),
        lambda: serving.label(Serving(), 8, name),
    ):
        with pytest.raises(VersionError, match="label"):
            taken()


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".a", "a\\b", "", "A", "\u0663", "9" * 13])
def test_no_name_leads_out_of_the_folder_of_adapters(name, tmp_path):
    with pytest.raises(VersionError, match="name"):
        versions.adapter_folder("run", name)
    with pytest.raises(VersionError, match="label"):
        serving.add_adapter(Serving(), name, Adapter(base=0, rank=8))
    place = Place(str(tmp_path))
    adapters = {each: {"base": 0, "rank": 8} for each in (name, "tune", "15")}
    place.at("serving.json").write(json.dumps({"adapters": adapters, "labels": {"a/b": 5}}).encode())
    state = serving.read_serving(place)
    assert set(state.adapters) == {"tune", "15"} and state.labels == {"a/b": 5}
    with pytest.raises(VersionError, match="there is no adapter '15'; there is tune"):
        serving.remove_adapter(state, "15")
    assert [versions.adapter_folder("run", each) for each in state.adapters] == [
        "run/adapters/tune",
        "run/versions/000015",
    ]


def test_a_command_is_carried_out_once_for_each_id(tmp_path):
    place = Place(str(tmp_path))

    def rollback(id):
        return serving.edit_serving(
            place, lambda state: commands.apply_once(state, INFOS, id, commands.Rollback()), "latest"
        )

    serving.edit_serving(place, published)
    assert [rollback(id).live for id in ("one", "one", "two", "one", "two")] == [8, 8, 5, 5, 5]
    done = serving.read_serving(place).done
    assert [(each.id, each.live) for each in done] == [("one", 8), ("two", 5)]
    with pytest.raises(VersionError, match=r"the id one is that of another command, Rollback\(\)"):
        commands.apply_once(serving.read_serving(place), INFOS, "one", commands.Pin("5"))
    with pytest.raises(VersionError, match="no version"):
        commands.apply_once(published(Serving()), INFOS, "three", commands.Pin("77"))
    state = published(Serving())
    for n in range(2 * commands.DONE_KEPT):
        state = commands.apply_once(state, INFOS, f"id-{n}", commands.Label("5", "blue"))
    assert len(state.done) == commands.DONE_KEPT


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"live": "many"}', b"\xff\xfe"])
def test_a_state_that_cannot_be_read_is_named_with_what_to_do(tmp_path, content):
    place = Place(str(tmp_path))
    place.at("serving.json").write(content)
    for use in (serving.read_serving, lambda place: serving.edit_serving(place, published)):
        with pytest.raises(VersionError, match=r"serving.json of the run cannot be read.*restore it, or remove it"):
            use(place)
    assert place.at("serving.json").read() == content


def test_a_lock_that_is_held_is_waited_for_and_named(tmp_path):
    place = Place(str(tmp_path))
    held = pytest.raises(VersionError, match="another process has held serving.lock for 0 s")
    with filelock.FileLock(place.at("serving.lock").path), held:
        serving.edit_serving(place, published, wait_s=0.1)


def new_run(folder):
    config = load_config({"model": {"path": "some/model"}, "data": {"train": "d"}, "run": {"dir": str(folder)}})
    return create_run(config)


def test_the_state_is_a_file_and_edits_of_several_do_not_get_lost(tmp_path):
    place = Place(str(tmp_path))
    assert serving.read_serving(place, "round") == Serving(follow="round")

    def pin(first):
        for version in range(first, first + 20):
            serving.edit_serving(place, lambda state, v=version: serving.pin(state, v))

    threads = [threading.Thread(target=pin, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(serving.read_serving(place).pinned) == 80
    with pytest.raises(VersionError):
        serving.edit_serving(place, serving.rollback)
    assert len(serving.read_serving(place).pinned) == 80


def test_the_command_line_changes_and_shows_it(tmp_path):
    from sampo_ray.console.main import app

    run = new_run(tmp_path / "run")
    for version, info in INFOS.items():
        Place(version_folder(run.versions.url, version)).at("version.json").write(info.model_dump_json().encode())
    serving.edit_serving(run.place, published)

    def sampo(*arguments):
        result = CliRunner().invoke(app, [arguments[0], run.place.url, *arguments[1:]])
        return result.exit_code, result.output

    assert sampo("pin", "round-1") == (0, "live: version 12, following latest; pinned: 8\n")
    assert sampo("rollback") == (0, "live: version 8, held there; pinned: 8\n")
    assert sampo("promote", "latest")[1].startswith("live: version 12, following")
    code, output = sampo("versions")
    assert code == 0 and "round-1" in output and "live" in output and "follow: latest" in output
    serving.edit_serving(run.place, lambda state: serving.pin(state, 5))
    trouble = Trouble(what="pinned versions", reason="no memory", since=1.0, last=time.time(), tries=7)
    for store, state, at in (("a", "pinned", 0), ("b", "failing", time.time()), ("c", "starting", 0)):
        pins = {5: PinState(state=state, reason="no memory" if state == "failing" else None)}
        report = Report(at=at, pins=pins, troubles=(trouble,) if state == "failing" else ())
        report_place(run.place, store).write(report.model_dump_json().encode())
    report_place(run.place, "d").write(b"{")
    output = " ".join(sampo("versions")[1].split())
    assert "failing: no" in output and "pinned versions: no memory (7 times since" in output
    code, output = sampo("promote", "nope")
    assert code == 1 and "no version 'nope' is kept; there is 0 (base)" in output
    assert CliRunner().invoke(app, ["versions", str(tmp_path)]).exit_code == 1


def test_a_run_keeps_how_its_versions_go_live_and_where_they_come_from(tmp_path):
    tree = {
        "model": {"path": "org/llama"},
        "data": {"train": "d"},
        "run": {"dir": str(tmp_path / "a")},
        "serve": {"follow": "round", "gates": {"max_growth": 1.5}, "host": "0.0.0.0", "api_keys": ["secret"]},
    }
    run = create_run(load_config(tree))
    found = read_serve_config(run.place)
    assert (found.follow, found.gates.max_growth, found.api_keys) == ("round", 1.5, ())
    assert read_serve_config(Place(str(tmp_path))) == ServeConfig(api_keys=())
    mine = lineage(run.config, None)
    assert mine.base == "llama" and mine.method == "sigmoid/sample, beta 0.1"
    tree["run"]["dir"] = str(tmp_path / "b")
    assert lineage(create_run(load_config(tree)).config, None) == mine
    other = load_config(tree, ["method.beta=0.2"])
    assert lineage(other, None).recipe != mine.recipe


def test_checks_judge_length_and_win_rate():
    gates = GatesConfig(max_mean_tokens=50, max_growth=1.5, min_win_rate=0.5)
    before = Probe([10, 20], [True, True], [1.0, 0.0])
    assert judge(gates, Probe([30, 31], [True, True], [1.0, 1.0]), None).passed
    assert judge(gates, Probe([15, 25], [True, True], [1.0, 0.0]), before).passed
    assert "max_growth=1.5" in judge(gates, Probe([30, 20], [True, True], [1.0, 1.0]), before).reason
    assert "max_mean_tokens=50" in judge(gates, Probe([90, 20], [True, True], [1.0, 1.0]), None).reason
    assert "win rate of 0.250" in judge(gates, Probe([10, 10], [True, True], [0.0, 0.0]), before).reason
    assert win_rate([None, 2.0], [1.0, 1.0]) == 1.0 and win_rate([None], [1.0]) is None
    assert not GatesConfig().any and GatesConfig(finite=True).any and not GatesConfig(finite=True).probing
