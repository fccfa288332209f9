"""The run's data as parts of token ids: one actor reads it, tasks tokenize it.

The reader goes through the sources once, in order, and gives chunk after chunk to as many tasks as there are cores.
A part holds in its metadata what it was made of and what was left out, so a run that was cut off makes only the parts
that are missing or whose rows have changed. The driver sees counts and references.
"""

import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from sampo_ray.config.columns import Columns
from sampo_ray.config.sections import DataConfig
from sampo_ray.data.preferences import PAIRS, PROMPTS, tokenized_pairs, tokenized_prompts
from sampo_ray.errors import DataError, StageError, UserError
from sampo_ray.internals.ray_nodes import ANY_NODE, NODE_ID, cluster_use
from sampo_ray.loop.blocks import ATTEMPTS, GROWTH, PAUSE_S, STAGE_STALL_S, StageOutput, Work
from sampo_ray.run.manifest import DataRecord, StageRecord
from sampo_ray.run.parts import LOST, logger, part_place
from sampo_ray.run.storage import Place
from sampo_ray.sources.chunks import Chunk, Reading, decoded, expected, fingerprint
from sampo_ray.sources.records import Record
from sampo_ray.sources.rows import Counts, Kind, rows_of
from sampo_ray.sources.source import Source

if TYPE_CHECKING:
    from sampo_ray.data.chat import ChatFormat

CPUS = 0.1
"""What reader and tasks ask Ray for. Each keeps a core busy, but by now the run's actors hold most logical CPUs of a
small machine, and stand idle until the first round. How many tasks run is decided by `tasks_at_once`. On one machine
Ray's default scheduling gives them the same processes again, which have loaded the tokenizer. On several it would give
all of them to one node, since they ask for so little: see `elsewhere`."""
MARK = b"sampo"
"""The key of a part's metadata."""


class Progress(Protocol):
    """Counts the rows of the sources; rounds.StageReporter."""

    def advance(self, count: int = 1) -> None: ...
    def expect(self, total: int) -> None: ...


@dataclass(frozen=True)
class Tokenizing:
    """What is tokenized, and how. `seed` is the run's, `data` has the limits on lengths."""

    kind: Kind
    sources: Sequence[Source]
    seed: int
    tokenizer: Place
    data: DataConfig

    @property
    def reading(self) -> Reading:
        return Reading(self.sources, self.seed)

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def key(self, chunk: Chunk) -> str:
        """What a part of these rows is recognised by: SHA-256 (hex) of their content and of how they are tokenized."""
        limits, columns = (
            [self.data.prompt_limit, self.data.max_length],
            self.sources[chunk.source].columns.model_dump(),
        )
        how = json.dumps([self.kind, limits, columns, chunk.digest], sort_keys=True)
        return hashlib.sha256(how.encode()).hexdigest()


def tokenize(what: Tokenizing, out: Place, progress: Progress) -> DataRecord:
    """Makes the parts of `what` in a folder that holds nothing else, but for those that are there already.

    Raises DataError for sources that cannot be read or have no usable row, StageError where tasks fail.
    """
    stage = _Stage(what, out, progress)
    stage.run()
    counts = Counts()
    for index in sorted(stage.made):
        counts.add(stage.made[index])
    if not counts.usable:
        raise counts.nothing_usable(", ".join(what.names), what.kind)
    stage.remove_others()
    record = record_of(counts, [stage.made[index].usable for index in sorted(stage.made)])
    digests = fingerprint(chunk.digest for chunk in stage.chunks)
    used = stage.rows_used() if len(what.sources) > 1 else {}
    return DataRecord(source=what.names, fingerprint=digests, used=used, **record)


def record_of(counts: Counts, rows: list[int]) -> dict[str, object]:
    """The fields of a stage's record that say what became of a source's rows; `rows` are those of each part."""
    found = vars(counts) | {"rows": rows, "rows_read": counts.rows, "dropped": dict(counts.dropped)}
    return {name: value for name, value in found.items() if name in StageRecord.model_fields}


def tables(records: Sequence[Record], columns: Columns, what: Tokenizing, counts: Counts) -> pa.Table:
    """PAIRS or PROMPTS of records, which may be none."""
    chat, data = _chat(what.tokenizer), what.data
    rows = rows_of(records, what.kind, columns, counts)
    pairs = what.kind == "pairs"
    blocks = (
        tokenized_pairs(rows, chat, data, counts) if pairs else tokenized_prompts(rows, chat, data.prompt_limit, counts)
    )
    return pa.concat_tables([(PAIRS if pairs else PROMPTS).empty_table(), *blocks])


@functools.lru_cache(maxsize=1)
def _chat(tokenizer: Place) -> "ChatFormat":
    """Loaded once a process, which tokenizes many chunks."""
    # One thread a task: as many tasks run as there are cores. It is read when the process first tokenizes. Turning
    # the library's threads off instead (TOKENIZERS_PARALLELISM) was 25 % slower than its pool of one.
    os.environ["RAYON_NUM_THREADS"] = "1"
    from sampo_ray.data.chat import ChatFormat  # takes seconds, which other stages' processes save

    with tokenizer.on_disk() as folder:
        return ChatFormat.load(folder, "tokenizer")


@ray.remote(num_cpus=CPUS)
def _tokenize(place: Place, content: bytes, chunk: Chunk, what: Tokenizing) -> Counts:
    """Makes the part of one chunk."""
    counts = Counts()
    table = tables(decoded(content), what.sources[chunk.source].columns, what, counts)
    about = json.dumps({"key": what.key(chunk), "counts": vars(counts)})
    place.write_table(table.replace_schema_metadata({MARK: about.encode()}))
    return counts


def _made(place: Place, key: str) -> Counts | None:
    """The counts of a part that is there, if it was made of the rows and in the way that `key` stands for."""
    about = json.loads(place.table_metadata().get(MARK, b"{}"))
    if about.get("key") != key:
        return None
    return Counts(**about["counts"] | {"dropped": Counter(about["counts"]["dropped"])})


class _Reader:
    """Reads chunk after chunk, from the one after `done`, which have that fingerprint."""

    def __init__(self, reading: Reading, done: int, before: str) -> None:
        self._chunks, self._done, self._before = reading.chunks(), done, before

    @ray.method(num_returns=2)
    def take(self) -> tuple[Chunk | None, bytes]:
        """The next chunk, for the driver, and its content, for a task; None at the end."""
        skipped = [chunk.digest for _, (chunk, _) in zip(range(self._done), self._chunks, strict=False)]
        if skipped and fingerprint(skipped) != self._before:
            raise DataError(_CHANGED)
        self._done = 0
        return next(self._chunks, (None, b""))


@ray.remote(num_cpus=CPUS)
def _read_again(reading: Reading, index: int, digest: str) -> bytes:
    """The content of a chunk that was lost on its way."""
    for number, (chunk, content) in enumerate(reading.chunks()):
        if number == index and chunk.digest == digest:
            return content
    raise DataError(_CHANGED)


_start_reader = ray.remote(num_cpus=CPUS)(_Reader)
_CHANGED = "the data source has changed while it was read; resume the run once it is complete"


class _Stage:
    """The tokenizing of a run's data in progress, as the driver sees it."""

    def __init__(self, what: Tokenizing, out: Place, progress: Progress) -> None:
        self.what, self.out, self.progress = what, out, progress
        self.chunks: list[Chunk] = []
        self.made: dict[int, Counts] = {}
        self._rows = 0  # of the chunks
        self._contents: dict[int, ray.ObjectRef] = {}
        self._names, self._where = set(out.names()), elsewhere()

    def run(self) -> None:
        work = Work[Counts](
            StageOutput(self.out), tasks_at_once(), self._missing(), self._start, result=lambda ref: ref
        )
        for index, _, counts in work.completed():
            del self._contents[index]
            self._complete(index, counts)

    def rows_used(self) -> dict[str, int]:
        """Rows of each source."""
        used = dict.fromkeys(self.what.names, 0)
        for chunk in self.chunks:
            used[self.what.names[chunk.source]] += chunk.rows
        return used

    def remove_others(self) -> None:
        """Removes parts of rows that the sources no longer have."""
        for name in self._names - {part_place(self.out, index).name for index in range(len(self.chunks))}:
            self.out.at(name).remove()

    def _missing(self) -> Iterator[int]:
        """Indices of the parts that are to be made, as their chunks are read."""
        for chunk, content in self._read():
            index = len(self.chunks)
            self.chunks.append(chunk)
            self._rows += chunk.rows
            if (total := expected(self._rows, chunk.share)) is not None:
                self.progress.expect(total)
            place = part_place(self.out, index)
            if place.name in self._names and (counts := _made(place, self.what.key(chunk))):
                self._complete(index, counts)
                continue
            self._contents[index] = content
            yield index
        self.progress.expect(self._rows)

    def _complete(self, index: int, counts: Counts) -> None:
        self.made[index] = counts
        self.progress.advance(self.chunks[index].rows)

    def _start(self, index: int, place: Place, again: bool) -> ray.ObjectRef:
        chunk = self.chunks[index]
        if again:  # the node that had the content may be gone
            read_again = _read_again.options(**self._where)
            self._contents[index] = read_again.remote(self.what.reading, index, chunk.digest)
        return _tokenize.options(**self._where).remote(place, self._contents[index], chunk, self.what)

    def _read(self) -> Iterator[tuple[Chunk, ray.ObjectRef]]:
        """Chunks, each while the one after it is read, from a reader that is started again where it is lost."""
        lost = 0
        while True:
            read = [chunk.digest for chunk in self.chunks]
            reader = _start_reader.options(**self._where).remote(self.what.reading, len(read), fingerprint(read))
            try:
                ahead = reader.take.remote()
                while (chunk := _answer(ahead[0])) is not None:
                    content, ahead = ahead[1], reader.take.remote()
                    yield chunk, content
                return
            except LOST as error:
                lost += 1
                if lost == ATTEMPTS:
                    raise StageError(f"the process that reads the data was lost {ATTEMPTS} times: {error}") from None
                logger.warning("the process that reads the data was lost and is started again")
                time.sleep(PAUSE_S * GROWTH ** (lost - 1))
            finally:
                ray.kill(reader)


def _answer(ref: ray.ObjectRef) -> Chunk | None:
    try:
        chunk: Chunk | None = ray.get(ref, timeout=STAGE_STALL_S)
        return chunk
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else StageError(str(error.cause))) from None
    except GetTimeoutError:
        raise StageError(f"nothing could be read of the data for {STAGE_STALL_S:.0f} s") from None


def tasks_at_once() -> int:
    """The cores of the cluster's machines. A Ray that was started for one command has more logical CPUs than cores."""
    nodes = cluster_use().nodes
    cores = [node.total.get("CPU", 0.0) for node in nodes if len(nodes) == 1 or not node.head]
    return max(1, int(sum(cores) if len(nodes) > 1 else min(cores[0], os.cpu_count() or 1)))


def elsewhere() -> dict[str, Any]:
    """Options of tasks that many nodes share, the head only where no other has room; none on one node."""
    nodes = cluster_use().nodes
    others = [{NODE_ID: f"!{node.id}"} for node in nodes if node.head and len(nodes) > 1]
    if not others:
        return {}
    return {"scheduling_strategy": "SPREAD", "label_selector": others[0], "fallback_strategy": ANY_NODE}
