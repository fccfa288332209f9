"""Files of each format and compression: texts as they are written, and errors for what is broken or unclear."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sampo_ray.errors import DataError
from sampo_ray.sources import tables
from sampo_ray.sources.records import open_source, read_records

ROWS = [{"prompt": f"Which bird is on flag {n}?", "chosen": "A tern.", "rejected": "No idea."} for n in range(3)]


def values(source):
    return [record.values for record in read_records(str(source))]


def as_csv(rows, **how):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def zst(content):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(content)
    return out.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst, "zstd": zst}
SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A frame of zstd that holds no data, as parallel compressors write in front."""

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(
    rows=st.lists(st.tuples(texts, texts, texts), max_size=6),
    delimiter=st.sampled_from([",", ";", "\t"]),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_text_comes_back_from_csv(tmp_path_factory, rows, delimiter, ending, quoting, encoding):
    cut = ending == "\n" and quoting == csv.QUOTE_MINIMAL  # then "\r" is not quoted, and at a line's end a part of it
    assume(not (cut and any(row[-1].endswith("\r") for row in rows)))
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if delimiter == "\t" else "a.csv")
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    text = as_csv(rows or ROWS[:1], delimiter=delimiter, lineterminator=ending, quoting=quoting)
    path.write_bytes((text if rows else text.partition(ending)[0]).encode(encoding))
    assert values(path) == rows


@pytest.mark.parametrize("extension", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_every_compression_of_every_text_format_is_read(tmp_path, name, extension):
    content = json.dumps(ROWS) if name == "a.json" else as_lines(ROWS)
    if name[-2:] == "sv":
        content = as_csv(ROWS, delimiter="\t" if name == "a.tsv" else ",")
    path = tmp_path / f"{name}.{extension}"
    path.write_bytes(PACK[extension](content.encode()))
    assert values(path) == ROWS


@given(
    cuts=st.lists(st.integers(0, 600), max_size=5),
    kind=st.sampled_from(["gz", "bz2", "xz", "zst"]),
    skipped=st.booleans(),
)
def test_all_frames_of_a_file_are_read(tmp_path_factory, cuts, kind, skipped):
    path = tmp_path_factory.mktemp("frames") / f"a.jsonl.{kind}"
    content = as_lines(ROWS).encode()
    ends = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    pieces = [PACK[kind](content[start:end]) for start, end in itertools.pairwise(ends)]
    path.write_bytes((SKIPPED if skipped and kind == "zst" else b"") + b"".join(pieces))
    assert values(path) == ROWS


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("left", [0, 3, 20, -1, -9])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, kind, left):
    path = tmp_path / f"a.jsonl.{kind}"
    whole = PACK[kind](as_lines(ROWS * 50).encode())
    path.write_bytes(whole[:left])
    with pytest.raises(DataError, match=r"a\.jsonl\."):
        values(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst"])
def test_a_file_that_a_browser_has_unpacked_is_read(tmp_path, name):
    (tmp_path / name).write_text(as_csv(ROWS) if "csv" in name else as_lines(ROWS))
    assert values(tmp_path / name) == ROWS


def test_text_of_csv_is_no_number_and_no_null(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\n007,null,\n1.50,NA,True\n")
    assert values(path) == [
        {"prompt": "007", "chosen": "null", "rejected": ""},
        {"prompt": "1.50", "chosen": "NA", "rejected": "True"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "prompt;chosen\na, b;c\n",
        "sep=;\nprompt;chosen\na, b;c\n",
        'sep=,\r\nprompt,chosen\r\n"a, b",c\r\n',
        'prompt, chosen\n"a, b", "c"\n',
        "prompt\tchosen\na, b\tc\n",
        '\ufeff"prompt",chosen\n\n"a, b",c\n\n',
    ],
)
def test_spreadsheets_of_every_country_are_read(tmp_path, text):
    (tmp_path / "a.csv").write_text(text, newline="")
    assert values(tmp_path / "a.csv") == [{"prompt": "a, b", "chosen": "c"}]


def test_a_return_inside_an_unquoted_cell_is_text_and_those_of_old_macs_end_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,chosen\nx,a\rb\ny,c\r\n")
    assert [row["chosen"] for row in values(tmp_path / "a.csv")] == ["a\rb", "c"]
    (tmp_path / "a.csv").write_bytes(b'prompt,chosen\rx,"a\rb"\ry,c\r')
    assert [row["chosen"] for row in values(tmp_path / "a.csv")] == ["a\rb", "c"]


def test_the_index_that_pandas_writes_is_a_column(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt,chosen\n0,a,b\n")
    assert values(tmp_path / "a.csv") == [{"Unnamed: 0": "0", "prompt": "a", "chosen": "b"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1\n", r"a\.csv:3: has 1 cells for 2 columns"),
        ('a,b\n"x\ny",2\n1,2,3\n', r"a\.csv:4: has 3 cells for 2 columns"),
        ("a,b,a\n1,2,3\n", r"a\.csv:1: the column 'a' is there twice"),
        ("a,,b\n1,,3\n1,2,3\n", r"a\.csv:3: column 2 has text and no name"),
        ('a,b\n1,"2\n3,4\n', r"a\.csv:2: not valid CSV \(unexpected end of data\)"),
        ('a,b\n"say \\"no\\"",2\n', r"a\.csv:2: not valid CSV .*twice"),
        ("a,b;c\n1,2\n", "both ',' and ';' are in its line of column names"),
        ("\n\n", r"a\.csv:1: has no column names"),
    ],
)
def test_a_broken_csv_names_file_and_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        values(tmp_path / "a.csv")


def test_a_csv_in_another_encoding_says_so(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,chosen\ncafé,b\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv'?: is not UTF-8 text"):
        values(tmp_path / "a.csv")


def test_a_cell_may_be_large_and_a_file_is_not_held_in_memory(tmp_path):
    with (tmp_path / "a.csv").open("w") as file:
        file.write("prompt,chosen\n")
        for _ in range(100):
            file.write("x" * 400_000 + ",y\n")
    tracemalloc.start()
    assert sum(len(str(record.values["prompt"])) for record in read_records(str(tmp_path / "a.csv"))) == 40_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20, "of 40 MB"


@pytest.mark.parametrize("spelled", [{"indent": 1}, {}])
def test_an_object_that_holds_rows_is_read_as_they(tmp_path, spelled):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "data": ROWS}, **spelled))
    assert values(path) == values(f"{path}:data") == ROWS
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}, **spelled))
    with pytest.raises(DataError, match=r"has rows under train, test; name one, as in .*a\.json:train"):
        values(path)
    assert values(f"{path}:test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no rows under 'dev'; name one of train, test"):
        values(f"{path}:dev")


def test_an_object_over_several_lines_is_a_row_and_so_are_more_of_them(tmp_path):
    row = {"prompt": "?", "chosen": [{"role": "assistant", "content": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    assert values(tmp_path / "a.json") == [row]
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2) * 2 + "\n" + json.dumps({"data": ROWS}))
    assert values(tmp_path / "a.json") == [row, row, {"data": ROWS}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"data": ROWS}))
    assert values(tmp_path / "a.jsonl") == [{"data": ROWS}]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "list"])
def test_a_table_column_by_column_is_refused_with_the_fix(tmp_path, orient):
    import pandas as pd

    table = pd.DataFrame(ROWS)
    text = json.dumps(table.to_dict(orient="list")) if orient == "list" else table.to_json(orient=orient)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="column by column.*orient='records', lines=True"):
        values(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK\x03\x04", r"a\.xlsx.*save the sheet as CSV"),
        ("a.tar.gz", b"", r"a\.tar\.gz.*unpack it"),
        ("a.pkl", b"", "may run code"),
        ("a.dat", b"", r"use \.jsonl, \.json, \.csv"),
        ("a.csv", b"PK\x03\x04abc", "a document or an archive"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "is a web page"),
    ],
)
def test_what_is_no_data_is_refused_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        values(tmp_path / name)


def test_arrow_files_and_streams_are_read_whole(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    assert values(tmp_path / "a.feather") == values(tmp_path / "a.arrow") == ROWS
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-8])
    with pytest.raises(DataError, match="is cut off"):
        values(tmp_path / "a.arrow")


def test_odd_columns_of_parquet_are_read(tmp_path):
    kinds = {
        "text": pa.binary(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "tags": pa.map_(pa.string(), pa.string()),
        "scores": pa.list_(pa.float32(), 2),
        "nothing": pa.struct({"a": pa.null(), "b": pa.list_(pa.string())}),
        "large": pa.large_string(),
    }
    row = {
        "text": b"caf\xc3\xa9",
        "image": {"bytes": b"\x89PNG\xff", "path": None},
        "tags": [("a", "b")],
        "scores": [0.5, 1.5],
        "nothing": {"a": None, "b": None},
        "large": "x",
    }
    pq.write_table(pa.Table.from_pylist([row, dict.fromkeys(kinds)], pa.schema(kinds)), tmp_path / "a.parquet")
    first, second = values(tmp_path / "a.parquet")
    assert first == row | {"text": "café", "image": {"bytes": "(5 bytes)", "path": None}, "tags": {"a": "b"}}
    assert second == dict.fromkeys(kinds)


def test_a_parquet_file_with_large_rows_is_read_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 1 << 20)
    asked = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda file, batch_size: asked.append(batch_size) or batches(file, batch_size)
    )
    for size in (10, 100_000):
        rows = [{"prompt": f"{n}" * size} for n in range(300)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
        assert values(tmp_path / "a.parquet") == rows
    assert asked[0] == tables.BATCH_ROWS and asked[1] < 20


def test_how_much_has_been_read_goes_from_none_of_it_to_all(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_lines(ROWS * 2000))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS * 2000).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS * 200), tmp_path / "c.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in ("a.jsonl", "b.jsonl.gz", "c.parquet", "?.*", "saved"):
        opened = open_source(f"{tmp_path}/{source}")
        shares = [opened.share_read() for _ in opened.records()]
        assert shares == sorted(shares) and 0 < shares[0] <= 1, source
        assert source == "saved" or 0.3 < shares[len(shares) // 2] < 1 or source == "b.jsonl.gz"
        assert opened.share_read() == 1.0
