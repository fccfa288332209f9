"""Files and folders of a run by fsspec URL. pyarrow is imported only where tables are read or written."""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sampo_ray.run.remote_files import attempts, download, upload
from sampo_ray.run.scratch import scratch_folder

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

DRAFT = ".draft-"
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.tmp", re.DOTALL)
"""Files that `write` has not put in place yet, or never will, as the process was killed."""


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
        return bool(fs.exists(path))

    def modified(self) -> datetime | None:
        """When the file was written, by the clock of its storage; None where that does not say."""
        fs, path = self._fs()
        try:
            found: datetime = fs.modified(path)
        except NotImplementedError:
            return None
        return found

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
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise

    def create(self, content: bytes) -> bool:
        """Writes the file unless there is one; False: there is. Of several processes one has True, on storage with
        conditional writes (S3, GCS, Azure and most that are compatible), if the content of each is its own.
        """
        fs, path = self._fs()
        for attempt in attempts():
            with attempt:
                try:
                    fs.pipe_file(path, content, mode="create")
                except FileExistsError:  # maybe by this very request, whose answer was lost, so that it came again
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        return self.read() == content
                    return False
        return True

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
        """Names of what lies in the folder, sorted, but files that are being written; none when it does not exist."""
        fs, path = self._fs()
        try:
            found = [each.rstrip("/") for each in fs.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [each.rsplit("/", 1)[-1] for each in found if each != path]  # consoles make files of folders
        return sorted(name for name in names if not _UNFINISHED.fullmatch(name))

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
        """Moves what is in a local folder here, next to what is there already, each file whole or not at all."""
        fs, path = self._fs()
        if not self.local:
            upload(fs, [(each, f"{path}/{each.relative_to(folder)}") for each in folder.rglob("*") if each.is_file()])
            return
        os.makedirs(path, exist_ok=True)
        for file in sorted(folder.iterdir()):
            os.replace(file, f"{path}/{file.name}")

    def take_file(self, file: Path) -> None:
        """Moves a local file into this folder, whole or not at all."""
        fs, path = self._fs()
        if not self.local:
            upload(fs, [(file, f"{path}/{file.name}")])
            return
        os.makedirs(path, exist_ok=True)
        os.replace(file, f"{path}/{file.name}")

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
    def on_disk(self, names: Collection[str] | None = None) -> Iterator[Path]:
        """The folder as local files: itself, or a copy that is gone afterwards, of the files of these `names` only if
        there are any. FileNotFoundError where one of them is missing, or there is no such remote folder.
        """
        if self.local:
            yield Path(self.path)
            return
        with scratch_folder() as scratch:
            self.download(scratch / self.name, names)
            yield scratch / self.name

    def download(self, target: Path, names: Collection[str] | None = None) -> None:
        """Copies the folder's files, or those of these names, into a local folder; see `on_disk`."""
        fs, path = self._fs()
        download(fs, path.rstrip("/"), target, names)

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)  # others write there, too
        return fs, path


def absolute(url: str) -> str:
    """A local path made absolute, since ranks and replicas have other working directories; a URL as it is."""
    return url if re.match(r"^[a-z0-9+]+://", url) else str(Path(url).expanduser().resolve())
