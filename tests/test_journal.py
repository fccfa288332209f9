"""The journal that stores answers and votes; no Ray."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.run.feedback import MERGE_AT, Journal
from sampo_ray.run.storage import Place


def record(key, when, text=""):
    return json.dumps({"id": key, "time": when, "text": text}, ensure_ascii=False).encode()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), max_size=4)),
        st.tuples(st.just("merge"), st.integers(0, 90)),
        st.tuples(st.just("reopen"), st.none()),
        st.tuples(st.just("refresh"), st.none()),
    ),
    max_size=12,
)


@given(steps=STEPS, writers=st.lists(st.integers(0, 1), min_size=12, max_size=12), most=st.integers(1, 9))
def test_a_journal_never_loses_or_doubles_a_record_whichever_process_writes_and_merges(
    tmp_path_factory, steps, writers, most
):
    folder = Place(str(tmp_path_factory.mktemp("journal") / "j"))
    journals = [Journal(folder, 20.0, most=most), Journal(folder, 20.0)]
    expected = {}
    for (step, argument), writer in zip(steps, writers, strict=False):
        journal = journals[writer]
        if step == "append":
            new = [(f"k{key}", float(when)) for key, when in dict(argument).items()]
            journal.append([record(key, expected.setdefault(key, when), f"\u2028é{key}\r") for key, when in new])
        elif step == "merge":
            journal.merge(float(argument))
        elif step == "refresh":
            journal.refresh()
        else:
            journals[writer] = Journal(folder, 20.0)
    fresh = Journal(folder, 20.0)
    fresh.refresh()
    found = [json.loads(line) for line in fresh.records()]
    assert {each["id"]: each["time"] for each in found} == expected
    assert len(fresh) == len(expected) == len(found)
    for key in expected:
        assert json.loads(fresh.get(key))["text"] == f"\u2028é{key}\r"


@pytest.mark.parametrize("protocol", ["", "memory:/"])
def test_a_journal_merges_spans_and_drops_old_ones(tmp_path, protocol):
    folder = Place(f"{protocol}{tmp_path}/j")
    journal = Journal(folder, 10.0)
    for index in range(30):
        journal.append([record(f"k{index}", float(index))])
    assert len(folder.names()) == 30
    journal.merge(now=25.0)  # two spans are over
    assert len(folder.names()) == 2 + 10
    other = Journal(folder, 10.0)
    other.refresh()
    assert [json.loads(line)["id"] for line in other.records()] == [f"k{index}" for index in range(30)]
    journal.drop(before=15.0, most=100, most_bytes=1 << 20)
    assert "k9" not in journal and "k10" in journal  # its segment has newer records
    journal.drop(before=0.0, most=15, most_bytes=1 << 20)
    assert len(journal) <= 15 and "k29" in journal
    assert other.get("k5") is None and json.loads(other.get("k29"))["time"] == 29.0
    journal.drop(before=0.0, most=100, most_bytes=1)
    assert folder.names() == [] and journal.nbytes == 0


def test_a_span_with_many_segments_is_merged_before_it_is_over(tmp_path):
    journal = Journal(Place(f"{tmp_path}/j"), 1e6)
    for index in range(MERGE_AT):
        journal.append([record(f"k{index}", float(index))])
    journal.merge(now=100.0)
    assert len(Place(f"{tmp_path}/j").names()) == 1 and len(journal) == MERGE_AT


def test_merged_segments_stay_small_so_that_little_is_dropped_at_once(tmp_path):
    journal = Journal(Place(f"{tmp_path}/j"), 1000.0, most=10)
    for index in range(200):
        journal.append([record(f"k{index}", float(index))])
        journal.merge(now=float(index))
        journal.drop(before=0.0, most=100, most_bytes=1 << 20)
    assert len(journal) == 100 and "k199" in journal
    journal.merge(now=5000.0)
    assert len(Place(f"{tmp_path}/j").names()) == 10
    journal.append([record("one more", 200.0)])
    journal.drop(before=0.0, most=100, most_bytes=1 << 20)
    assert len(journal) == 91


@given(cut=st.integers(0, 100))
def test_a_segment_that_was_cut_short_costs_only_the_record_that_was_cut(tmp_path_factory, cut):
    folder = Place(str(tmp_path_factory.mktemp("journal") / "j"))
    Journal(folder, 10.0).append([record(f"k{index}", float(index), "é") for index in range(2)])
    (name,) = folder.names()
    content = folder.at(name).read()
    folder.at(name).write(content[: cut % (len(content) + 1)])
    folder.at("notes.jsonl").write(b"not ours")
    journal = Journal(folder, 10.0)
    journal.refresh()
    whole = content[: cut % (len(content) + 1) + 1].count(b"\n")
    assert journal.records() == [record(f"k{index}", float(index), "é") for index in range(whole)]
    journal.append([record("k2", 2.0)])
    journal.merge(now=50.0)
    journal.refresh()
    assert [json.loads(line)["id"] for line in journal.records()] == [*(f"k{index}" for index in range(whole)), "k2"]
