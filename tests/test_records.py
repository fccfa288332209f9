"""Records of files and repositories: text is the text of the file."""

import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.errors import DataError
from sampo_ray.sources import json_files
from sampo_ray.sources.records import read_records

ANSWERS = [
    "42",
    "007",
    "null",
    "true",
    "2024-05-01",
    "2024-02-29T12:00:00+02:00",
    '{"a": 1.50}',
    '"yes"',
    "1e3",
    "plain",
]
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train-*.EXTENSION
  - split: test_prefs
    path: data/test.EXTENSION
---
# A data set
"""


def rows(answers=ANSWERS):
    """Preference rows of these answers, the last of them a list of messages, so that the column is mixed."""
    plain = [{"prompt": "?", "chosen": text, "rejected": "No."} for text in answers]
    return [
        *plain,
        {"prompt": "?", "chosen": [{"role": "assistant", "content": "42"}], "rejected": "No.", "late": "00"},
    ]


def lines(content):
    return "".join(json.dumps(row) + "\n" for row in content)


def values(source):
    return [record.values for record in read_records(str(source))]


@pytest.fixture
def repository(tmp_path):
    """A folder that is laid out like a repository of the hub, with JSON Lines in two splits."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD.replace("EXTENSION", "jsonl"))
    (folder / "data/train-0.jsonl").write_text(lines(rows()))
    (folder / "data/train-1.jsonl").write_text(lines(rows(["1"])))
    (folder / "data/test.jsonl").write_text(lines(rows(["2"])))
    return folder


def test_text_of_a_repository_is_the_text_of_its_files(repository):
    assert values(f"{repository}:train_prefs") == rows() + rows(["1"])
    assert values(f"{repository}:test_prefs") == rows(["2"])


def test_datasets_alone_would_have_read_other_answers(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset(str(repository), split="train_prefs", streaming=True)
    assert [row["chosen"] for row in loaded][: len(ANSWERS)] != ANSWERS, "if this fails, datasets keeps text now"


def test_a_repository_whose_card_names_splits_asks_for_one(repository):
    for source in (repository, f"{repository}:validation"):
        with pytest.raises(DataError, match=r"has the splits train_prefs, test_prefs; name one, as in .*:train_prefs"):
            values(source)


def test_the_files_of_a_repository_without_a_card_are_found_as_datasets_finds_them(repository):
    (repository / "README.md").unlink()
    assert values(f"{repository}:train") == rows() + rows(["1"])
    assert values(f"{repository}:test") == rows(["2"])
    with pytest.raises(
        DataError, match=r"holds the splits train, test; name the one to read, as in .*:train, or several"
    ):
        values(repository)


@pytest.mark.parametrize("name", ["train.json", "train.json.gz", "train.ndjson", "train.jsonl.gz"])
@pytest.mark.parametrize("array", [True, False])
def test_json_of_every_name_and_layout_is_read_as_it_is_written(tmp_path, name, array):
    folder = tmp_path / "one"
    folder.mkdir()
    content = (json.dumps(rows(), indent=2) if array else lines(rows())).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for source in (folder / name, folder, f"{folder}:train"):
        assert values(source) == rows(), source


def test_positions_do_not_depend_on_where_a_repository_is(repository, tmp_path):
    positions = [record.position for record in read_records(f"{repository}:train_prefs")]
    assert positions[0] == "data/train-0.jsonl:1" and positions[-1] == "data/train-1.jsonl:2"
    moved = repository.rename(tmp_path / "elsewhere")
    assert [record.position for record in read_records(f"{moved}:train_prefs")] == positions


def test_a_dataset_of_the_hub_is_read_by_the_same_way(repository, monkeypatch, tmp_path):
    """In place of the hub stands a folder; `datasets` gives URLs of the hub's files where these are paths."""
    asked = []
    load, names = datasets.load_dataset_builder, datasets.get_dataset_config_names
    monkeypatch.setattr(
        datasets, "get_dataset_config_names", lambda name: (asked.append(name), names(str(repository)))[1]
    )
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, configuration: load(str(repository), configuration)
    )
    monkeypatch.chdir(tmp_path)
    assert values("org/name:train_prefs") == rows() + rows(["1"])
    assert asked == ["org/name"]


def test_a_dataset_that_the_hub_does_not_give_is_an_error_that_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"org/none \(no local file, so a hub dataset\)'?: cannot be read"):
        values("org/none")


def test_a_key_that_first_appears_late_is_read(repository):
    filler = [{"prompt": "x" * 1000, "chosen": "42", "rejected": "b"}] * 11_000  # more than a block of datasets' reader
    (repository / "data/train-0.jsonl").write_text(lines([*filler, {"prompt": "?", "late": "007"}]))
    *_, last = read_records(f"{repository}:train_prefs")
    found = next(r for r in read_records(f"{repository}:train_prefs") if "late" in r.values)
    assert found.values["late"] == "007" and last.values["late"] == "00"


def test_parquet_and_other_formats_of_a_repository_are_read(tmp_path):
    plain = [{"prompt": "?", "chosen": text, "rejected": "No."} for text in ANSWERS]
    for extension in ("parquet", "csv"):
        folder = tmp_path / extension
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text(CARD.replace("EXTENSION", extension))
        for name in ("train-0", "test"):
            table = datasets.Dataset.from_list(plain)
            getattr(table, f"to_{extension}")(folder / f"data/{name}.{extension}")
        found = values(f"{folder}:train_prefs")
        assert found == plain


def test_json_columns_of_a_parquet_file_are_what_they_say(tmp_path):
    """`datasets` writes such columns for values of several kinds."""
    content = [
        {"c": "hi", "m": [{"content": {"x": [1]}}]},
        {"c": None, "m": [{"content": "text"}]},
        {"c": 4, "m": None},
    ]
    kinds = datasets.Features({"c": datasets.Json(), "m": datasets.List({"content": datasets.Json()})})
    datasets.Dataset.from_list(content, features=kinds).to_parquet(tmp_path / "a.parquet")
    assert isinstance(pq.read_schema(tmp_path / "a.parquet").field("c").type, pa.JsonType)
    assert values(tmp_path / "a.parquet") == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, 3]', r"a\.json:2: holds a int"),
        ('[{"a": 1} {"a": 2}]', r"""a\.json:1: not valid JSON \('{' after entry 1\)"""),
        ('[{"a": 1},]', r"a\.json:2: not valid JSON"),
        ('[{"a": 1}, {"a": ', r"a\.json:2: not valid JSON"),
        ('[{"a": 1}', r"a\.json:1: not valid JSON \('' after entry 1\)"),
        ('[{"a": 1}] [', r"a\.json:1: not valid JSON \(more after the array\)"),
        ('{\n"a": 1\n', r"a\.json:1: not valid JSON .*; write one JSON object a line, or an array of objects"),
        ('{"a": 1}\n{"a": 1,}', r"a\.json:2: not valid JSON"),
    ],
)
def test_a_broken_array_names_its_file_and_entry(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        values(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[]", " \n[ ]\n", "\ufeff[]"])
def test_an_empty_array_has_no_rows(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert values(tmp_path / "a.json") == []


texts = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    content=st.lists(
        st.dictionaries(texts, texts | st.integers() | st.none() | st.lists(texts, max_size=3), max_size=3)
    ),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_an_array_is_read_the_same_in_chunks_of_any_size(tmp_path_factory, content, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        assert values(path) == content


def test_a_large_array_is_not_held_in_memory(tmp_path):
    with (tmp_path / "a.json").open("w") as file:
        file.write("[")
        for _ in range(4000):
            file.write(json.dumps({"prompt": "x" * 10_000}) + ",\n")
        file.write('{"prompt": "last"}]')
    tracemalloc.start()
    last = [record.position for record in read_records(str(tmp_path / "a.json"))][-1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last == "a.json:4001" and peak < 12 << 20, "of 40 MB"
