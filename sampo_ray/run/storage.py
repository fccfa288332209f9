"""Files and folders of a run by fsspec URL. pyarrow is imported only where tables are read or written."""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sampo_ray.run.scratch import scratch_folder

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

DRAFT = ".draft-"


@dataclass(frozen=True)
class Place:
    """A folder by fsspec URL, with the few operations a run needs; cheap to send to actors."""

    url: str

    def at(self, *names: str) -> "Place":
        return Place("/".join([self.url.rstrip("/"), *names]))

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> bool:
        return isinstance(self._fs()[0], LocalFileSystem)

    @property
    def path(self) -> str:
        """The path without protocol."""
        return self._fs()[1]

    def exists(self) -> bool:
        fs, path = self._fs()
        fs.invalidate_cache()
        return bool(fs.exists(path))

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """The file, or its bytes `start` to `end`; a negative start counts from its end."""
        fs, path = self._fs()
        return bytes(fs.cat_file(path, start=start, end=end))

    def write(self, content: bytes) -> None:
        """Replaces the file atomically: readers see the old content or the new."""
        fs, path = self._fs()
        if not self.local:
            fs.pipe_file(path, content)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)

    def write_table(self, table: "pa.Table") -> None:
        """Writes a block as Parquet, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(sink.getvalue().to_pybytes())

    def read_table(self) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(self.read()))

    def table_rows(self) -> int:
        """Rows of a Parquet part, from its footer."""
        return int(self._footer().num_rows)

    def table_metadata(self) -> dict[bytes, bytes]:
        """What is noted in the footer of a Parquet part, by key."""
        return dict(self._footer().metadata or {})

    def _footer(self) -> "pq.FileMetaData":
        import pyarrow.parquet as pq

        fs, path = self._fs()
        with fs.open(path, "rb") as file:
            return pq.read_metadata(file)

    def names(self) -> list[str]:
        """Names of what lies in the folder, sorted; none when it does not exist."""
        fs, path = self._fs()
        fs.invalidate_cache()
        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(path, detail=False)) if fs.exists(path) else []

    def remove(self) -> None:
        """Removes a file, or a folder with what is in it; no matter if it is gone already."""
        fs, path = self._fs()
        if not self.local:
            with contextlib.suppress(FileNotFoundError):
                fs.rm(path, recursive=True)
        elif os.path.isdir(path):  # fsspec would look at the working directory, which a job may have lost
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)

    def take(self, folder: Path) -> None:
        """Moves what is in a local folder here, next to what is there already."""
        fs, path = self._fs()
        fs.makedirs(path, exist_ok=True)
        for file in sorted(folder.iterdir()):
            if self.local:
                os.replace(file, f"{path}/{file.name}")
            else:
                fs.put(str(file), f"{path}/{file.name}", recursive=file.is_dir())

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A scratch folder on this machine, on the same file system where this place is local; gone afterwards."""
        if not self.local:
            with scratch_folder() as scratch:
                yield scratch
            return
        parent = os.path.dirname(self.path)
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=parent) as draft:
            yield Path(draft)

    def clear_drafts(self) -> None:
        """Removes what drafts next to this folder's files left when their processes were killed."""
        for left in Path(self.path).glob(f"{DRAFT}*") if self.local else ():
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The folder as local files: itself, or a copy that is gone afterwards."""
        fs, path = self._fs()
        if self.local:
            yield Path(path)
            return
        with scratch_folder() as scratch:
            target = scratch / path.rsplit("/", 1)[-1]
            fs.get(path, str(target), recursive=True)
            yield target

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = fsspec.core.url_to_fs(self.url)
        return fs, path


def absolute(url: str) -> str:
    """A local path made absolute, since ranks and replicas have other working directories; a URL as it is."""
    return url if re.match(r"^[a-z0-9+]+://", url) else str(Path(url).expanduser().resolve())
