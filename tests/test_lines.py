"""Files of JSON lines: whatever cut the last line short, they can be read and appended to."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.errors import DataError
from sampo_ray.run import lines
from sampo_ray.run.storage import Place

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), max_size=5)


def text_of(record):
    """With text as UTF-8, so that a cut may be in the middle of a character."""
    try:
        (text := json.dumps(record, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


@pytest.mark.parametrize("url", ["{}/lines/{}", "memory://lines{}/{}"])
@given(before=RECORDS, after=RECORDS, cut=st.integers(0), zeros=st.integers(0, 3))
def test_any_beginning_of_a_file_is_read_and_appended_to(tmp_path_factory, url, before, after, cut, zeros):
    file = Place(url.format(tmp_path_factory.getbasetemp(), "metrics.jsonl"))
    content = "".join(text_of(each) + "\n" for each in before).encode()
    kept = content[: cut % (len(content) + 1)]
    whole = before[: content[: len(kept) + 1].count(b"\n")]
    if len(whole) == kept.count(b"\n"):
        kept += bytes(zeros)  # what a power failure leaves of bytes that were not written yet
    file.write(kept)
    assert lines.records(file.read(), "f") == whole
    for each in after:
        lines.append(file, text_of(each))
    assert lines.records(file.read(), "f") == [*whole, *after]
    if after:
        assert file.read() == "".join(text_of(each) + "\n" for each in [*whole, *after]).encode()


@given(cut=st.integers(1, 31), behind=st.sampled_from(["", "\0\0"]))
def test_a_record_that_was_written_behind_a_line_cut_short_is_found(cut, behind):
    first, second = ({"loss": 0.5, "reason": "é", "step": step} for step in (1, 2))
    torn = json.dumps(first, ensure_ascii=False).encode()[:cut] + behind.encode()
    content = torn + json.dumps(second).encode() + b"\n" + json.dumps(first).encode() + b"\n"
    assert lines.records(content, "f") == [second, first]


def test_what_is_left_out_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert lines.records(b'{"a": 1}\n{"a": \n{"a": 2}\n', "here.jsonl") == [{"a": 1}, {"a": 2}]
    assert [record.getMessage() for record in caplog.records] == [
        "here.jsonl: a line of 5 bytes was cut short, and is left out"
    ]


@pytest.mark.parametrize("line", [b"hello", b"[1]", b"1", b'"{"'])
def test_a_line_that_no_append_can_have_left_is_named(line):
    with pytest.raises(DataError, match="f, line 2: is no JSON object"):
        lines.records(b'{"a": 1}\n' + line + b"\n", "f")


def test_a_file_on_object_storage_grows_by_parts_and_is_read_as_one(s3, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 200)
    file, written = Place(f"{s3}/run/metrics.jsonl"), list[int]()
    Place(f"{s3}/run/metrics.jsonl.tmp").write(b"no part of it")
    write, whole = Place.write, ""
    monkeypatch.setattr(Place, "write", lambda place, content: written.append(len(content)) or write(place, content))
    for step in range(40):
        lines.append(file, json.dumps({"step": step}))
        whole += json.dumps({"step": step}) + "\n"
    assert lines.read(file) == whole.encode() == b"".join(part.read() for part in lines._parts(file))
    assert max(written) <= 230 and len(lines._parts(file)) > 2
    for size in (1, 100, 250, 10_000):
        assert lines.read(file, size) == whole.encode()[-size:]
    assert lines.read(Place(f"{s3}/run/none.jsonl")) == b"" == lines.read(Place("/nowhere/none.jsonl"))
    assert lines.read(Place(f"{s3}/run/none.jsonl"), 5) == b""


def test_the_tail_of_a_local_file_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"0123456789")
    assert [lines.read(Place(f"{tmp_path}/a.jsonl"), size) for size in (3, 10, 99)] == [b"789", *[b"0123456789"] * 2]
