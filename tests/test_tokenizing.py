"""A run's data as parts: what is read, made, and made again; on real Ray where it is marked slow."""

import json
import os
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from sampo_ray.config.columns import Columns
from sampo_ray.config.sections import DataConfig
from sampo_ray.errors import DataError
from sampo_ray.loop import tokenizing
from sampo_ray.loop.tokenizing import Tokenizing, record_of, tokenize
from sampo_ray.run.manifest import DataRecord
from sampo_ray.run.parts import parts_of
from sampo_ray.run.storage import Place
from sampo_ray.sources.chunks import CHUNK_ROWS, Chunk, Reading, decoded, encoded, expected, fingerprint
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts
from sampo_ray.sources.source import Source
from sampo_ray.training.streams import completion_seed
from tests.notes import Stage
from tests.waiting import wait_until

READ = Columns(prompt="prompt", chosen="chosen", rejected="rejected")


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Where is shed {number}?", "chosen": f"By dam {number}.", "rejected": f"Not by dam {number}."}


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chunks(*sources: Source, seed: int = 0) -> list[tuple[Chunk, list[Record]]]:
    return [(chunk, decoded(content)) for chunk, content in Reading(sources, seed).chunks()]


def test_chunks_hold_all_records_in_order_and_none_has_rows_of_two_sources(tmp_path):
    a, b = (write(tmp_path / name / "t.jsonl", [pair(i) for i in range(600)]) for name in "ab")
    found = chunks(Source(a, READ, "1/"), Source(b, READ, "2/"))
    assert [(chunk.source, chunk.rows) for chunk, _ in found] == [(0, 512), (0, 88), (1, 512), (1, 88)]
    records = [record for _, some in found for record in some]
    assert [record.values for record in records] == [pair(i) for i in range(600)] * 2
    assert records[0].position == "1/t.jsonl:1" and records[600].position == "2/t.jsonl:1"
    assert records[600].where == f"{b}:1" and len({record.position for record in records}) == 1200


def test_digests_say_which_rows_have_changed_and_not_where_they_lie(tmp_path):
    rows = [pair(i) for i in range(2 * CHUNK_ROWS)]
    first = [chunk.digest for chunk, _ in chunks(Source(write(tmp_path / "x/t.jsonl", rows), READ))]
    moved = [chunk.digest for chunk, _ in chunks(Source(write(tmp_path / "y/t.jsonl", rows), READ))]
    rows[CHUNK_ROWS]["chosen"] += " "
    changed = [chunk.digest for chunk, _ in chunks(Source(write(tmp_path / "x/t.jsonl", rows), READ))]
    assert first == moved and changed[0] == first[0] and changed[1] != first[1]
    assert fingerprint(first) == fingerprint(moved) != fingerprint(changed)


def test_what_json_does_not_know_becomes_text_and_lone_surrogates_stay():
    values = {"a": "\ud800", "b": b"x", "c": [1.5, None], "d": "é"}
    content, _ = encoded([Record("p:1", "/w:1", values)])
    assert decoded(content) == [Record("p:1", "/w:1", values | {"b": "b'x'"})]


def test_a_share_of_each_source_is_drawn_the_same_each_time(tmp_path):
    path = write(tmp_path / "t.jsonl", [pair(i) for i in range(2000)])

    def drawn(seed: int) -> list[str]:
        return [r.position for _, some in chunks(Source(path, READ, share=0.25), seed=seed) for r in some]

    assert len(drawn(1)) == 500 and drawn(1) == drawn(1) != drawn(2)
    assert all(a < b for a, b in zip(*[[int(p.split(":")[1]) for p in drawn(1)][i:] for i in (0, 1)], strict=False))


def test_the_number_of_rows_is_estimated_by_the_share_that_is_read():
    assert expected(512, 0.5) == 1024 and expected(512, None) is None and expected(0, 0.0) is None


def test_a_key_changes_with_the_rows_and_with_how_they_are_tokenized():
    def key(digest: str = "d", columns: Columns = READ, **data: int) -> str:
        what = Tokenizing("pairs", [Source("s", columns)], 0, Place("t"), DataConfig(**data))
        return what.key(Chunk(0, 1, digest, None))

    assert len({key(), key("e"), key(max_length=64), key(columns=Columns(prompt="q"))}) == 4 and key() == key()


def test_the_record_is_the_sum_of_its_parts():
    counts = Counts()
    for number in (1, 2):
        part = Counts(rows=10 * number, prompts_cut=number, responses_cut=1)
        part.drop("empty", f"t.jsonl:{number}")
        counts.add(part)
    record = DataRecord(source="s", **record_of(counts, [9, 19]))
    assert record.model_dump() == {
        "source": "s",
        "rows": [9, 19],
        "rows_read": 30,
        "dropped": {"empty": 2},
        "prompts_cut": 3,
        "responses_cut": 2,
    } | dict.fromkeys(record.model_fields_set & {"questions_cut"}, 0)
    assert counts.first == {"empty": "t.jsonl:1"}


def test_the_same_prompt_twice_in_a_file_has_ids_and_seeds_of_its_own(tmp_path):
    rows = [{"prompt": "Where is the mill?", "id": "q"}] * 2
    ids = [r.position for _, some in chunks(Source(write(tmp_path / "t.jsonl", rows), READ)) for r in some]
    assert len(set(ids)) == 2 and len({completion_seed(7, each, 0) for each in ids}) == 2


class Cut(Exception):
    """Ends a stage as a killed driver would."""


class CutProgress(Stage):
    """Raises after some rows."""

    most: int = 10**9

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        if self.done >= self.most:
            raise Cut


def progress(most: int = 10**9) -> CutProgress:
    made = CutProgress("tokenize", None, "rows")
    made.most = most
    return made


def times(out: Place) -> dict[str, int]:
    return {name: os.stat(out.at(name).path).st_mtime_ns for name in out.names()}


@pytest.fixture
def ask(tiny_model, tmp_path):
    """Tokenizes rows, written as the only source, into `out`."""
    from sampo_ray.data.chat import ChatFormat

    ChatFormat.load(tiny_model, "llama3").save(tmp_path / "tokenizer")
    out = Place(str(tmp_path / "data"))

    def tokenized(rows: list[dict], stage: CutProgress | None = None) -> DataRecord:
        source = Source(write(tmp_path / "t.jsonl", rows), READ)
        data = DataConfig(max_length=256)
        what = Tokenizing("pairs", [source], 0, Place(str(tmp_path / "tokenizer")), data)
        return tokenize(what, out, stage or progress())

    return tokenized, out


def ids(out: Place, record: DataRecord) -> list[str]:
    return pa.concat_tables(part.table() for part in parts_of(out, record.rows))["id"].to_pylist()


@pytest.mark.slow
def test_only_missing_and_changed_parts_are_made_and_none_is_left_over(local_ray, ask):
    tokenized, out = ask
    rows = [pair(i) for i in range(5 * CHUNK_ROWS)]
    rows[1] = {"prompt": "Where?", "chosen": "", "rejected": "There."}
    with pytest.raises(Cut):
        tokenized(rows, progress(most=3 * CHUNK_ROWS))
    before = times(out)
    assert 3 <= len(before) <= 5
    stage = progress()
    whole = tokenized(rows, stage)
    after = times(out)
    assert len(after) == 5 and before.items() <= after.items(), "what was there is used"
    assert stage.done == stage.total == whole.rows_read == 5 * CHUNK_ROWS
    assert sum(whole.rows) == 5 * CHUNK_ROWS - 1 == sum(whole.rows[:1]) + 4 * CHUNK_ROWS
    assert whole.dropped.keys() and ids(out, whole)[:2] == ["t.jsonl:1", "t.jsonl:3"]

    rows[2 * CHUNK_ROWS]["chosen"] = "In the reeds."
    changed = tokenized(rows)
    made = {name for name, time in times(out).items() if after[name] != time}
    assert made == {"part-00002.parquet"} and changed.fingerprint != whole.fingerprint
    shorter = tokenized(rows[: CHUNK_ROWS + 5])
    assert out.names() == ["part-00000.parquet", "part-00001.parquet"] and shorter.rows == [CHUNK_ROWS - 1, 5]


@pytest.mark.slow
def test_a_reader_that_is_killed_is_started_again_where_it_was(local_ray, ask, monkeypatch):
    tokenized, out = ask
    monkeypatch.setattr(tokenizing, "PAUSE_S", 0.1)
    killed: list[int] = []

    def kill() -> None:
        [reader] = [p for p in psutil.Process().children(recursive=True) if "_Reader" in " ".join(p.cmdline())]
        killed.append(reader.pid)
        reader.kill()
        wait_until(lambda: not reader.is_running() or reader.status() == psutil.STATUS_ZOMBIE, "end of the reader")

    class Killing(CutProgress):
        def advance(self, count: int = 1) -> None:
            super().advance(count)
            if not killed:
                kill()

    record = tokenized([pair(i) for i in range(8 * CHUNK_ROWS)], Killing("tokenize", None, "rows"))
    assert killed and record.rows == [CHUNK_ROWS] * 8
    assert ids(out, record) == [f"t.jsonl:{i + 1}" for i in range(8 * CHUNK_ROWS)]


@pytest.mark.slow
def test_a_source_that_cannot_be_read_to_its_end_fails_with_its_own_message(local_ray, ask, tmp_path):
    tokenized, _ = ask
    rows = [pair(0)] * 3
    with pytest.raises(DataError, match="no usable row"):
        tokenized([{"prompt": "Where?", "chosen": "", "rejected": ""}])
    path = write(tmp_path / "bad.jsonl", rows)
    Path(path).write_text(Path(path).read_text() + "{broken\n")
    what = Tokenizing("pairs", [Source(path, READ)], 0, Place(str(tmp_path / "tokenizer")), DataConfig())
    with pytest.raises(DataError, match=r"bad.jsonl:4: not valid JSON"):
        tokenize(what, Place(str(tmp_path / "other")), progress())
