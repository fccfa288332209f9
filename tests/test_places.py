"""What names of sources name: folders and repositories with several parts are asked about, never mixed."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sampo_ray.errors import DataError
from sampo_ray.sources.records import is_here, read_records

CARD = """---
configs:
- config_name: helpful
  data_files:
  - split: train
    path: helpful/train.csv
  - split: test
    path: helpful/test.csv
- config_name: harmless
  data_files: harmless/*.csv
---
"""


def row(text):
    return {"prompt": "?", "chosen": text, "rejected": "no"}


def write(folder, files):
    """Files by name, each with a row that holds the name; some of them with other columns or content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([row(name)]), path)
        elif name.endswith(".csv"):
            path.write_text(f"prompt,chosen,rejected\n?,{name},no\n")
        else:
            path.write_text(content or json.dumps(row(name)))
    return folder


def chosen(source):
    return [record.values["chosen"] for record in read_records(str(source))]


PREFS = [f"{split}_{kind}-00000-of-00001.parquet" for split in ("train", "test") for kind in ("prefs", "sft", "gen")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "test.jsonl"], "the splits train, test; name the one to read, as in .*:train"),
        (["data/train/0.jsonl", "data/dev/0.jsonl"], "the splits train, validation"),
        ([f"data/{name}" for name in PREFS], "the splits test_gen, test_prefs, test_sft, train_gen.*:train_gen"),
        (PREFS, "the splits train, test"),
        (["train_prefs.jsonl", "train_sft.jsonl"], r"several sets of files \(train_prefs, train_sft\).*:train_prefs"),
        (["train.jsonl", "extra.jsonl"], r"the split train beside other files \(extra\.jsonl\)"),
        (["helpful/0.jsonl", "harmless/0.jsonl"], r"several folders with data \(harmless, helpful\).*/harmless"),
        (["a.jsonl", "old/a.jsonl"], r"several folders with data \(\., old\).*/old"),
        (["a.jsonl", "a.jsonl.gz"], "the same file in several formats"),
        (["a.jsonl", "a.parquet"], "the same file in several formats"),
    ],
)
def test_a_folder_with_several_parts_is_asked_about(tmp_path, names, message):
    write(tmp_path, dict.fromkeys(names))
    with pytest.raises(DataError, match=message):
        chosen(tmp_path)


def test_a_folder_with_files_of_different_columns_is_asked_about(tmp_path):
    write(tmp_path, {"pairs.jsonl": None, "prompts.jsonl": '{"prompt": "?"}'})
    with pytest.raises(
        DataError, match=r"different columns \(pairs, prompts\); name the one to read, as in .*/pairs\*"
    ):
        chosen(tmp_path)
    assert chosen(f"{tmp_path}/pairs*") == ["pairs.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl"],
        ["part-0.jsonl", "part-1.jsonl", "README.md"],
        ["helpful.jsonl", "harmless.jsonl"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["x/0001.csv", "x/0002.csv"],
    ],
)
def test_files_that_belong_together_are_read_together(tmp_path, names):
    write(tmp_path, dict.fromkeys(names))
    assert sorted(chosen(tmp_path)) == sorted(name for name in names if name != "README.md")


def test_hidden_files_and_descriptions_are_no_data(tmp_path):
    write(tmp_path, {"a.json": None, ".cache/b.json": None, "dataset_info.json": "{}", "__old__/c.json": None})
    assert chosen(tmp_path) == ["a.json"]


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_part_of_a_folder_is_named_after_a_colon(tmp_path, folder):
    write(tmp_path / folder, dict.fromkeys(PREFS))
    for part in ("train_prefs", "test_sft"):
        assert [name.rpartition("/")[2] for name in chosen(f"{tmp_path}:{part}")] == [f"{part}-00000-of-00001.parquet"]
    assert is_here(f"{tmp_path}:train_prefs") and is_here(f"{tmp_path}:default:train_prefs")
    with pytest.raises(DataError, match="has no split 'train_rm'"):
        chosen(f"{tmp_path}:train_rm")


def test_a_split_that_datasets_makes_of_several_sets_is_asked_about(tmp_path):
    write(tmp_path, dict.fromkeys(PREFS))
    with pytest.raises(DataError, match=r"several sets of files \(train_gen, train_prefs, train_sft\)"):
        chosen(f"{tmp_path}:train")


def test_a_folder_in_a_folder_is_a_configuration(tmp_path):
    names = [f"{part}/{split}.jsonl" for part in ("helpful", "harmless") for split in ("train", "test")]
    write(tmp_path, dict.fromkeys(names))
    assert chosen(f"{tmp_path}:helpful:train") == ["helpful/train.jsonl"]
    with pytest.raises(DataError, match="the splits train, test"):
        chosen(f"{tmp_path}:harmless")
    with pytest.raises(DataError, match="several folders with data"):
        chosen(f"{tmp_path}:train")


def test_folders_at_urls_are_asked_about_as_those_here(tmp_path):
    import fsspec

    with fsspec.open("memory://places/train_prefs.jsonl", "w") as file:
        file.write(json.dumps(row("train_prefs")))
    with fsspec.open("memory://places/test_prefs.jsonl", "w") as file:
        file.write(json.dumps(row("test_prefs")))
    with pytest.raises(DataError, match="the splits train, test"):
        chosen("memory://places")
    assert chosen("memory://places:train") == chosen("memory://places:train_prefs") == ["train_prefs"]


def test_configurations_of_a_card_are_asked_about_and_named(tmp_path):
    names = ["helpful/train.csv", "helpful/test.csv", "harmless/a.csv", "harmless/b.csv"]
    write(tmp_path, dict.fromkeys(names)).joinpath("README.md").write_text(CARD)
    known = re.escape(f"has the configurations helpful, harmless; name one, as in {tmp_path}:helpful")
    for source in (tmp_path, f"{tmp_path}:train", f"{tmp_path}:other:train"):
        with pytest.raises(DataError, match=known):
            chosen(source)
    assert chosen(f"{tmp_path}:helpful") == chosen(f"{tmp_path}:helpful:train") == names[:1]
    assert chosen(f"{tmp_path}:helpful:test") == names[1:2]
    assert chosen(f"{tmp_path}:harmless") == names[2:]
    with pytest.raises(DataError, match=r"has the splits train, test; name one, as in .*:helpful:train"):
        chosen(f"{tmp_path}:helpful:dev")


def test_a_saved_dataset_has_splits_and_no_configurations(tmp_path):
    made = {name: datasets.Dataset.from_list([row(name)]) for name in ("train_prefs", "test_prefs")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    assert chosen(f"{tmp_path}/saved:test_prefs") == ["test_prefs"]
    with pytest.raises(DataError, match="has the splits train_prefs, test_prefs; name one"):
        chosen(tmp_path / "saved")
    with pytest.raises(DataError, match="was saved without configurations"):
        chosen(f"{tmp_path}/saved:default:test_prefs")


def test_a_name_with_colons_of_its_own_is_found(tmp_path):
    write(tmp_path, {"run:2/a:b.jsonl": None})
    assert chosen(f"{tmp_path}/run:2/a:b.jsonl") == chosen(f"{tmp_path}/run:2") == ["run:2/a:b.jsonl"]
    with pytest.raises(DataError, match="is a file, which has no splits; drop :train"):
        chosen(f"{tmp_path}/run:2/a:b.jsonl:train")
