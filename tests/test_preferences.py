import dataclasses
import gzip
import itertools
import json
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.config.sections import DataConfig
from sampo_ray.data import preferences
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.preferences import (
    PAIRS,
    PROMPTS,
    SCORES,
    best_against_worst,
    tokenized_pairs,
    tokenized_prompts,
)
from sampo_ray.errors import DataError
from sampo_ray.sources.rows import Counts, first_rows, read_rows
from tests.conftest import random_pairs

ASK = [{"role": "user", "content": "Is it?"}]
PLAIN = {"prompt": "Is it?", "chosen": "yes", "rejected": "no"}


def answer(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chat(tiny_model):
    return ChatFormat.load(tiny_model, "llama3-sampo")


def pairs_in(path, chat, data, counts):
    return list(tokenized_pairs(read_rows(path, "pairs", counts), chat, data, counts))


def one_row(tmp_path, values, kind="pairs"):
    return next(read_rows(write(tmp_path / "one.jsonl", [values]), kind))


@pytest.mark.parametrize(
    "values",
    [
        PLAIN,
        PLAIN | {"prompt": ASK},
        {"prompt": ASK, "chosen": [answer("yes")], "rejected": [answer("no")]},
        {"prompt": ASK, "chosen": [*ASK, answer("yes")], "rejected": [*ASK, answer("no")]},
        {"prompt": "Is it?", "chosen": [*ASK, answer("yes")], "rejected": [*ASK, answer("no")], "messages": ASK},
        {"chosen": [*ASK, answer("yes")], "rejected": [*ASK, answer("no")]},
        {"prompt": None, "chosen": [*ASK, answer("yes")], "rejected": "no"},
    ],
)
def test_every_layout_of_a_pair_gives_the_same_row(tmp_path, values):
    row = one_row(tmp_path, values)
    assert (row.prompt, row.chosen["content"], row.rejected["content"]) == (ASK, "yes", "no")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Is it?"},
        {"prompt": ASK},
        {"messages": ASK},
        {"messages": [*ASK, answer("yes")]},
        PLAIN,
        {"chosen": [*ASK, answer("yes")], "rejected": [*ASK, answer("no")]},
    ],
)
def test_every_layout_of_a_prompt_gives_the_same_row(tmp_path, values):
    row = one_row(tmp_path, values, "prompts")
    assert (row.prompt, row.chosen, row.rejected) == (ASK, None, None)


def test_a_system_turn_in_the_prompt_column_is_kept(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    row = one_row(
        tmp_path, {"prompt": [system, *ASK], "chosen": [*ASK, answer("yes")], "rejected": [*ASK, answer("no")]}
    )
    assert row.prompt == [system, *ASK]


def test_other_columns_are_kept_for_the_reward(tmp_path, chat):
    path = write(tmp_path / "a.jsonl", [{"prompt": "2+2?", "solution": 4, "tags": ["sum"], "chosen": "4"}])
    [block] = tokenized_prompts(read_rows(path, "prompts"), chat, 64, Counts())
    assert json.loads(block["columns"][0].as_py()) == {"solution": 4, "tags": ["sum"]}
    assert json.loads(block["messages"][0].as_py()) == [{"role": "user", "content": "2+2?"}]
    assert block.schema == PROMPTS


def test_all_containers_hold_the_same_rows(tmp_path):
    rows = [{"id": f"r{i}", "prompt": ASK, "chosen": f"yes {i}", "rejected": "no", "n": i} for i in range(5)]
    write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts/1.jsonl", rows[:2])
    pq.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "parts/2.parquet")

    def content(source):
        return [(row.prompt, row.chosen, row.rejected, row.columns) for row in read_rows(source, "pairs")]

    expected = content(str(tmp_path / "a.jsonl"))
    assert len(expected) == 5
    names = ["a.jsonl.gz", "a.parquet", "saved", "splits", "splits:train", "parts", "parts/*"]
    for source in [*(str(tmp_path / name) for name in names), f"file://{tmp_path}/a.parquet"]:
        assert content(source) == expected, source
    assert len(content(f"{tmp_path}/splits:test")) == 1


def test_a_url_is_read_like_a_file(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl", "w") as file:
        file.write(json.dumps(PLAIN) + "\n")
    assert first_rows("memory://bucket/a.jsonl", "pairs", 1)[0].chosen["content"] == "yes"


@pytest.mark.parametrize(
    ("reason", "values"),
    [
        ("no chosen or no rejected", {"prompt": "x", "chosen": "y"}),
        ("no prompt", {"chosen": "y", "rejected": "z"}),
        ("empty prompt", PLAIN | {"prompt": " \n"}),
        ("empty response", PLAIN | {"rejected": " "}),
        ("empty response", PLAIN | {"rejected": []}),
        ("identical responses", PLAIN | {"rejected": "yes"}),
        ("an answer begun in the prompt", PLAIN | {"prompt": [*ASK, answer("x")]}),
        ("wrong roles", PLAIN | {"chosen": ASK}),
        ("wrong roles", PLAIN | {"prompt": [*ASK, {"role": "system", "content": "x"}, *ASK]}),
        ("neither text nor a list of messages", PLAIN | {"chosen": 7}),
        ("neither text nor a list of messages", PLAIN | {"prompt": ["x"]}),
        ("a message without text", PLAIN | {"prompt": [{"role": "user", "content": None}]}),
        ("not valid Unicode", PLAIN | {"chosen": "\ud800"}),
        ("response of zero tokens", PLAIN | {"chosen": "\u200b"}),
        (
            "chosen and rejected answer different prompts",
            {"chosen": [*ASK, answer("y")], "rejected": [answer("z"), *ASK, answer("z")]},
        ),
    ],
)
def test_an_unusable_row_is_dropped_and_counted_by_reason(tmp_path, chat, reason, values):
    if reason == "response of zero tokens":
        chat = without_zero_width_space(chat)
    counts = Counts()
    blocks = pairs_in(write(tmp_path / "a.jsonl", [PLAIN, values]), chat, DataConfig(), counts)
    assert sum(block.num_rows for block in blocks) == counts.usable == 1
    assert counts.dropped == {reason: 1}
    assert counts.first[reason].endswith("a.jsonl:2")


def without_zero_width_space(chat):
    from dataclasses import replace

    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    core = type(chat.tokenizer.backend_tokenizer).from_str(chat.tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizers.Replace("\u200b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat.tokenizer.chat_template)
    return replace(chat, tokenizer=tokenizer)


def test_a_prompt_that_the_template_refuses_is_counted(tmp_path, tiny_model):
    chat = ChatFormat.load(tiny_model, "llama3")
    refusing = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    chat.tokenizer.chat_template = refusing + chat.tokenizer.chat_template
    counts = Counts()
    rows = [PLAIN, PLAIN | {"prompt": "bad"}]
    pairs_in(write(tmp_path / "a.jsonl", rows), chat, DataConfig(), counts)
    assert counts.dropped == {"refused by the chat template": 1}


@pytest.mark.parametrize("line", ['{"prompt": "x"', "[1, 2]", '"text"', '{"prompt": "\xff"}'])
def test_a_broken_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*one JSON object a line"):
        list(read_rows(str(path), "pairs"))


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    whole = gzip.compress("".join(json.dumps(PLAIN | {"n": i}) + "\n" for i in range(1000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-30])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name}.*cannot be read"):
            list(read_rows(str(tmp_path / name), "pairs"))


def test_a_source_without_a_usable_row_is_an_error_with_reasons_places_and_the_fix(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": " ", "chosen": "x", "rejected": "y"}] * 3)
    expected = r"a\.jsonl.*among 3 \(empty prompt: 3 \(first at .*a\.jsonl:1\)\); write prompt"
    for kind in ("pairs", "prompts"):
        with pytest.raises(DataError, match=expected):
            first_rows(path, kind, 1)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        first_rows(write(tmp_path / "a.jsonl", []), "pairs", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("*.jsonl", "no file matches"),
        ("notes.txt", r"write a \.jsonl"),
        ("empty", r"no \.jsonl"),
        ("splits", "name one, as in .*splits:a"),
    ],
)
def test_a_source_that_cannot_be_opened_is_an_error_with_the_fix(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    rows = datasets.Dataset.from_list([PLAIN])
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=message):
        first_rows(str(tmp_path / name), "pairs", 1)


def test_a_folder_with_held_out_files_is_not_read_as_one(tmp_path):
    write(tmp_path / "train.jsonl", [PLAIN])
    write(tmp_path / "test.jsonl", [PLAIN])
    with pytest.raises(DataError, match=r"holds the splits train, test; name the one to read, as in .*:train"):
        first_rows(str(tmp_path), "pairs", 1)
    assert len(list(read_rows(f"{tmp_path}/train*", "pairs"))) == 1


def test_a_rows_id_is_its_position_and_its_own_ids_are_columns_for_rewards(tmp_path):
    rows = [PLAIN | {"id": "a"}, PLAIN | {"id": "a", "prompt_id": 7}]
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "x.jsonl", tmp_path / "elsewhere/x.jsonl"):
        read = list(read_rows(write(path, rows), "pairs"))
        assert [row.id for row in read] == ["x.jsonl:1", "x.jsonl:2"]
        assert [row.columns for row in read] == [{"id": "a"}, {"id": "a", "prompt_id": 7}]


def test_responses_that_only_differ_beyond_the_limit_are_dropped(tmp_path, chat):
    rows = [PLAIN, {"prompt": "x", "chosen": "y" * 100 + "a", "rejected": "y" * 100 + "b"}]
    counts = Counts()
    pairs_in(write(tmp_path / "a.jsonl", rows), chat, DataConfig(max_length=64), counts)
    assert counts.dropped == {"identical responses within max_length": 1}


def test_blocks_have_the_given_number_of_rows_and_hold_the_same_rows_together(tmp_path, chat):
    path = write(tmp_path / "a.jsonl", [PLAIN | {"chosen": f"yes {i}"} for i in range(7)])
    blocks = list(tokenized_pairs(read_rows(path, "pairs"), chat, DataConfig(), Counts(), block_rows=3))
    assert [block.num_rows for block in blocks] == [3, 3, 1]
    [whole] = tokenized_pairs(read_rows(path, "pairs"), chat, DataConfig(), Counts())
    assert pa.concat_tables(blocks).combine_chunks() == whole


def scores(*samples):
    """SCORES of (prompt id, sample, reward, finish reason, text)."""
    rows = [
        {
            "id": prompt_id,
            "messages": "[]",
            "columns": "{}",
            "prompt": [1, 2],
            "sample": sample,
            "completion": list(text.encode()),
            "text": text,
            "finish_reason": finish,
            "logprobs": [],
            "first_version": 0,
            "last_version": 0,
            "reward": reward,
        }
        for prompt_id, sample, reward, finish, text in samples
    ]
    return pa.Table.from_pylist(rows, schema=SCORES)


def paired(*samples):
    pairs, counts = best_against_worst(scores(*samples))
    assert pairs.schema == PAIRS
    return [(p["id"], bytes(p["chosen"]).decode(), bytes(p["rejected"]).decode()) for p in pairs.to_pylist()], counts


def test_the_best_is_paired_with_the_worst_of_its_prompt():
    pairs, counts = paired(
        ("p", 0, 0.1, "stop", "a"),
        ("q", 0, 5.0, "stop", "x"),
        ("p", 1, 0.9, "stop", "b"),
        ("q", 1, 4.0, "stop", "y"),
        ("p", 2, 0.5, "stop", "c"),
    )
    assert pairs == [("p", "b", "a"), ("q", "x", "y")]
    assert not counts


def test_a_completion_cut_by_the_length_limit_may_be_rejected_but_not_chosen():
    assert paired(("p", 0, 9.0, "length", "a"), ("p", 1, 2.0, "stop", "b"), ("p", 2, 1.0, "length", "c"))[0] == [
        ("p", "b", "c")
    ]
    assert paired(("p", 0, 9.0, "length", "a"), ("p", 1, 2.0, "stop", "b")) == (
        [],
        {"only unfinished completions are better than the worst": 1},
    )
    assert paired(("p", 0, 9.0, "length", "a"), ("p", 1, 2.0, "length", "b")) == ([], {"no finished completion": 1})


def test_equal_rewards_are_broken_by_the_sample_number_whatever_the_order():
    samples = [("p", i, float(i // 2), "stop", f"t{i}") for i in range(4)]
    assert paired(*samples)[0] == paired(*reversed(samples))[0] == [("p", "t2", "t0")]


def test_ties_and_identical_texts_are_dropped_and_counted():
    assert paired(("p", 0, 1.0, "stop", "a"), ("p", 1, 1.0, "stop", "b")) == ([], {"tie": 1})
    assert paired(("p", 0, 1.0, "stop", "a"), ("p", 1, 2.0, "stop", "a")) == ([], {"identical texts": 1})


def test_completions_without_a_reward_are_left_out():
    pairs, counts = paired(
        ("p", 0, None, "stop", "a"), ("p", 1, 2.0, "stop", "b"), ("p", 2, 1.0, "stop", "c"), ("q", 0, 1.0, "stop", "d")
    )
    assert pairs == [("p", "b", "c")]
    assert counts == {"completions without a reward": 1, "fewer than two scored completions": 1}


def test_no_completions_make_no_pairs():
    assert paired() == ([], {})


samples = st.lists(
    st.tuples(st.sampled_from("pq"), st.sampled_from([None, 0.0, 1.0, 2.0]), st.sampled_from(["stop", "length"])),
    max_size=12,
)


@given(samples=samples)
def test_every_prompt_becomes_a_pair_or_is_counted(samples):
    rows = [(p, i, reward, finish, f"t{i}") for i, (p, reward, finish) in enumerate(samples)]
    pairs, counts = best_against_worst(scores(*rows))
    dropped = counts.total() - counts["completions without a reward"]
    assert pairs.num_rows + dropped == len({p for p, _, _ in samples})
    for pair in pairs.to_pylist():
        assert pair["chosen_reward"] > pair["rejected_reward"]


def test_the_pairs_of_a_block_are_its_rows_also_of_a_sliced_one():
    scored = ((pair, pair.chosen / 8, pair.rejected / 8) for pair in random_pairs(7))
    made = [dataclasses.replace(pair, chosen_ref=chosen, rejected_ref=rejected) for pair, chosen, rejected in scored]
    block = pa.Table.from_pylist([{**vars(pair), "chosen_reward": 1.0} for pair in made], PAIRS)
    whole = preferences.with_reference(block, made)
    assert whole.schema == preferences.REFERENCE
    for table in (block, whole, whole.slice(2, 3), pa.concat_tables([whole.slice(4), whole.slice(0, 2)])):
        found = [vars(pair) for pair in preferences.pairs_of(table)]
        assert len(found) == table.num_rows
        for pair, row in zip(found, table.to_pylist(), strict=True):
            assert pair["id"] == row["id"]
            assert all(pair[name].tolist() == row[name] for name in ("prompt", "chosen", "rejected"))
            for name in ("chosen_ref", "rejected_ref"):
                assert pair[name] is None if name not in row else pair[name].tolist() == row[name]


def test_ultrafeedback_is_checked_quickly_and_read_to_its_end(shared, chat):
    path = str(shared / "data/prefs/ultrafeedback_binarized/train.jsonl.gz")
    times = [time.process_time()]
    first_rows(path, "pairs", 1)
    times.append(time.process_time())
    counts = Counts()
    rows = sum(block.num_rows for block in pairs_in(path, chat, DataConfig(), counts))
    times.append(time.process_time())
    assert rows == counts.usable == 990 and counts.rows == 994
    assert counts.dropped == {"marks of a chat template within a text": 4}  # of other models
    checked, read = (end - start for start, end in itertools.pairwise(times))
    assert checked < read
