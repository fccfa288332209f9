"""Data sources, read as streams of records, and these as rows: prompts and preference pairs in the layouts users write.

A source is a JSONL file (compressed or not), a Parquet file, a glob or folder of such files, a folder written by
`datasets`' `save_to_disk`, or the name of a dataset on the Hugging Face hub. For the last two, a split is named after a
colon, as in `org/name:train_prefs`. Files may be at any fsspec URL.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs

from sampo_ray.errors import DataError

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

Kind = Literal["pairs", "prompts"]

_LAYOUT_COLUMNS = {"id", "prompt_id", "prompt", "messages", "chosen", "rejected"}
_EXPECTED = {
    "pairs": "write prompt, chosen and rejected, as strings or as lists of messages that end in the answer",
    "prompts": "write prompt as a string, or prompt or messages as a list of messages that ends with the user",
}
_PARQUET = re.compile(r"\.(parquet|pq)$")
_FILE = re.compile(r"\.((jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?|parquet|pq)$")
_FILE_IN_FOLDER = re.compile(r"\.((jsonl|ndjson)(\.(gz|bz2|xz|zst))?|parquet|pq)$")  # a .json may be anything
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|eval|dev)([^a-z]|$)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row. `position` is unique in its source and the same on every machine, `where` a 1-based `file:line`."""

    position: str
    where: str
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row. `chosen` and `rejected` are None where only prompts are read; `columns` are all other columns."""

    id: str
    where: str
    prompt: list[Message]
    chosen: str | None
    rejected: str | None
    columns: dict[str, object]


@dataclass
class Counts:
    """How many rows of a source were read, dropped and cut; filled while the source is read."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    responses_cut: int = 0
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first row that was dropped for it

    @property
    def usable(self) -> int:
        return self.rows - self.dropped.total()

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def nothing_usable(self, source: str, kind: Kind) -> DataError:
        """The error for a source without a usable row."""
        if not self.rows:
            return DataError(f"data source {source!r}: holds no rows; {_EXPECTED[kind]}")
        reasons = ", ".join(f"{why}: {n} (first at {self.first[why]})" for why, n in self.dropped.most_common())
        return DataError(f"data source {source!r}: no usable row among {self.rows} ({reasons}); {_EXPECTED[kind]}")


class Unusable(Exception):
    """A row or prompt that is dropped; the message is the reason it is counted under."""


def read_rows(source: str, kind: Kind, counts: Counts | None = None, most_records: int | None = None) -> Iterator[Row]:
    """Streams the usable rows of `source`; counts the others by reason in `counts`.

    A row's id is its `id` or `prompt_id` (a repeated one gets `#2`, `#3`, ...), else its position in the source. Only
    the ids stay in memory. DataError for a source that cannot be read, and for a line that is not valid JSON.
    """
    counts = Counts() if counts is None else counts
    parse = _parse_pair if kind == "pairs" else _parse_prompt
    seen: dict[str, int] = {}
    for record in itertools.islice(read_records(source), most_records):
        counts.rows += 1
        try:
            prompt, chosen, rejected = parse(record.values)
            row_id = _row_id(record, seen)
        except Unusable as reason:
            counts.drop(str(reason), record.where)
            continue
        columns = {name: value for name, value in record.values.items() if name not in _LAYOUT_COLUMNS}
        yield Row(row_id, record.where, prompt, chosen, rejected, columns)


def first_rows(source: str, kind: Kind, most: int) -> list[Row]:
    """Opens `source` and returns its first usable rows, 1 to `most`. DataError if there is none near its beginning."""
    counts = Counts()
    rows = list(itertools.islice(read_rows(source, kind, counts, most_records=1000), most))
    if not rows:
        raise counts.nothing_usable(source, kind)
    return rows


def _parse_pair(values: Mapping[str, object]) -> tuple[list[Message], str, str]:
    chosen_prompt, chosen = _response(values.get("chosen"))
    rejected_prompt, rejected = _response(values.get("rejected"))
    if chosen_prompt and rejected_prompt and chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected answer different prompts")
    prompt = _whole_prompt(values.get("prompt"), chosen_prompt or rejected_prompt)
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty response")
    if chosen == rejected:
        raise Unusable("identical responses")
    return prompt, chosen, rejected


def _parse_prompt(values: Mapping[str, object]) -> tuple[list[Message], None, None]:
    prompt = values.get("prompt")
    if prompt is None and values.get("messages") is not None:
        messages = _messages(values["messages"])
        prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if prompt is None and isinstance(values.get("chosen"), list):
        prompt, _ = _response(values["chosen"])
    return _whole_prompt(prompt, []), None, None


def _response(value: object) -> tuple[list[Message], str]:
    """A chosen or rejected column as the messages before the answer (none for a string) and the answer."""
    if value is None:
        raise Unusable("no chosen or no rejected")
    if isinstance(value, str):
        return [], _unicode(value)
    messages = _messages(value)
    if not messages:
        raise Unusable("empty response")
    if messages[-1]["role"] != "assistant":
        raise Unusable("wrong roles")
    return messages[:-1], messages[-1]["content"]


def _whole_prompt(prompt: object, prefix: list[Message]) -> list[Message]:
    """The prompt column, or the messages that chosen and rejected begin with (`prefix`)."""
    if isinstance(prompt, str):
        text = _unicode(prompt)
        messages = prefix or [{"role": "user", "content": text}]
    elif prompt is None:
        messages = prefix
    else:
        messages = _messages(prompt)
        if prefix and messages[-len(prefix) :] != prefix:
            raise Unusable("chosen and rejected answer different prompts")
    if not messages:
        raise Unusable("no prompt")
    if messages[-1]["role"] != "user" or any(message["role"] == "system" for message in messages[1:]):
        raise Unusable("wrong roles")
    if not messages[-1]["content"].strip():
        raise Unusable("empty prompt")
    return messages


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("neither text nor a list of messages")
    return [_message(message.get("role"), message.get("content")) for message in value]


def _message(role: object, content: object) -> Message:
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise Unusable("wrong roles")
    if not isinstance(content, str):
        raise Unusable("a message without text")
    return {"role": role, "content": _unicode(content)}


def _unicode(text: str) -> str:
    """The text, unless it has a lone surrogate: JSON can spell those, tokenizers and Arrow strings cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("not valid Unicode") from None
    return text


def _row_id(record: Record, seen: dict[str, int]) -> str:
    given = next((record.values[name] for name in ("id", "prompt_id") if record.values.get(name) is not None), None)
    if given is None:
        return record.position
    name = original = _unicode(str(given))
    while name in seen:
        seen[original] += 1
        name = f"{original}#{seen[original]}"
    seen[name] = 1
    return name


def read_records(source: str) -> Iterator[Record]:
    """Streams a source's rows in an order that depends on the source alone. Raises DataError."""
    with _as_data_error(source):
        opened = _open(source)
    if isinstance(opened, _Dataset):
        yield from _dataset_records(source, opened)
        return
    for path in opened.paths:
        read = _parquet_rows if _PARQUET.search(path) else _json_rows
        for number, values in read(opened.fs, path):
            yield Record(f"{opened.name(path)}:{number}", f"{path}:{number}", values)


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of a source's content; for a hub dataset, of its name and commit."""
    digest = hashlib.sha256()
    with _as_data_error(source):
        opened = _open(source)
        if isinstance(opened, _Dataset) and opened.files is None:
            from huggingface_hub import dataset_info

            digest.update(f"{source}\n{dataset_info(opened.name).sha}".encode())
            return digest.hexdigest()
        files = opened if isinstance(opened, _Files) else opened.files
        assert files is not None
        for path in files.paths:
            digest.update(f"{files.name(path)}\n{files.fs.size(path)}\n".encode())
            with files.fs.open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Files:
    fs: AbstractFileSystem
    root: str
    paths: list[str]

    def name(self, path: str) -> str:
        """A file's path relative to the source, the same on every machine."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


@dataclass(frozen=True)
class _Dataset:
    name: str
    split: str | None
    files: _Files | None  # None: it is on the hub


def _open(source: str) -> _Files | _Dataset:
    folder, _, split = source.rpartition(":")
    if folder and not split.startswith("//") and (saved := _saved_dataset(folder)):
        return _Dataset(folder, split, saved)
    if saved := _saved_dataset(source):
        return _Dataset(source, None, saved)
    fs, path = url_to_fs(source)
    if has_magic(source):
        root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        return _Files(fs, root, _readable(source, sorted(fs.glob(path))))
    if _FILE.search(path):
        if fs.exists(path):
            return _Files(fs, path, [path])
    elif "://" in source or fs.exists(path):
        return _folder(source, fs, path)
    elif _HUB_NAME.fullmatch(source):
        name, _, split = source.partition(":")
        return _Dataset(name, split or None, None)
    raise DataError(f"data source {source!r}: no such file or folder; name a file, a folder, a URL or a hub dataset")


def _saved_dataset(source: str) -> _Files | None:
    """The files of a folder that `datasets` wrote; None for any other source."""
    if has_magic(source) or _FILE.search(source):
        return None
    fs, path = url_to_fs(source)
    if any(fs.exists(f"{path}/{mark}") for mark in ("dataset_dict.json", "state.json")):
        return _Files(fs, path, sorted(fs.find(path)))
    return None


def _folder(source: str, fs: AbstractFileSystem, path: str) -> _Files:
    if fs.isfile(path):
        return _Files(fs, path, _readable(source, [path]))
    files = _Files(fs, path, [p for p in sorted(fs.find(path)) if _FILE_IN_FOLDER.search(p)])
    if not files.paths:
        raise DataError(f"data source {source!r}: no .jsonl(.gz) or .parquet files in this folder; name another one")
    held_out = [p for p in files.paths if _HELD_OUT.search(files.name(p).lower())]
    if held_out and len(held_out) < len(files.paths):
        raise DataError(
            f"data source {source!r}: holds training data beside held-out files ({files.name(held_out[0])}); "
            f"name the ones to read, as in {source.rstrip('/')}/train*"
        )
    return files


def _readable(source: str, paths: list[str]) -> list[str]:
    if not paths:
        raise DataError(f"data source {source!r}: no file matches; correct the pattern")
    for path in paths:
        if not _FILE.search(path):
            raise DataError(f"data source {path!r}: this format cannot be read; use .jsonl(.gz) or .parquet")
    return paths


def _json_rows(fs: AbstractFileSystem, path: str) -> Iterator[tuple[int, dict[str, object]]]:
    with _as_data_error(path), fs.open(path, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); write one JSON object a line") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}:{number}: holds a {type(values).__name__}; write one JSON object a line")
            yield number, values


def _parquet_rows(fs: AbstractFileSystem, path: str) -> Iterator[tuple[int, dict[str, object]]]:
    with _as_data_error(path), fs.open(path, "rb") as file:
        batches = pq.ParquetFile(file).iter_batches(batch_size=256)  # rows in memory at a time
        yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)


def _dataset_records(source: str, dataset: _Dataset) -> Iterator[Record]:
    import datasets  # takes a second, which plain files do not need

    hub = dataset.files is None
    with _as_data_error(f"{source} (no local file, so a hub dataset)" if hub else source):
        loaded = datasets.load_dataset(dataset.name, streaming=True) if hub else datasets.load_from_disk(dataset.name)
    split = ""
    if isinstance(loaded, dict):
        split = dataset.split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "")
        if split not in loaded:
            raise DataError(
                f"data source {source!r}: has the splits {', '.join(map(str, loaded))}; "
                f"name one, as in {dataset.name}:{next(iter(loaded))}"
            )
        loaded = loaded[split]
    elif dataset.split is not None:
        raise DataError(f"data source {source!r}: has no splits; drop :{dataset.split}")
    with _as_data_error(source):
        for number, values in enumerate(loaded, start=1):
            yield Record(f"{split or 'row'}:{number}", f"{source}:{number}", values)


@contextlib.contextmanager
def _as_data_error(where: str) -> Iterator[None]:
    """Raises DataError for whatever file systems, decompressors and readers raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each file system has its own library's errors, which share no other base
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise DataError(f"data source {where!r}: cannot be read ({reason}); check that it is complete") from error
