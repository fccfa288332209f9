"""Scratch folders on this machine. Those of processes that were killed are removed by the next that needs one.

Processes hold a lock on the folders that they use. The kernel frees it however a process ends, which tells folders in
use from those that were left.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = "sampo-scratch-"
COMPLETE = ".complete"
LOOK_S = 0.1


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder among the machine's temporary files, which is gone afterwards."""
    remove_left_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with _locked(folder, fcntl.LOCK_EX) as mine:
            if mine is not None and folder.exists():  # else another process took it for one that was left
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextlib.contextmanager
def shared_folder(name: str, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A folder of that name for all of this user's processes on the machine that need what `fill` puts into it: the
    first one fills it, while the others wait, and it is gone once the last has left."""
    remove_left_folders()
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getuid()}-{name}"
    while True:
        _make(folder)
        # The lock alone: nobody uses the folder. The lock with others: whoever was filling it has done so, or has died.
        with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone is not None and _is(folder, alone):
                _fill(folder, fill)
                fcntl.flock(alone, fcntl.LOCK_SH)
                if _is(folder, alone):  # nobody took it for one that was left, in between
                    try:
                        yield folder
                    finally:
                        _leave(folder, alone)
                    return
        with _locked(folder, fcntl.LOCK_SH) as together:
            if together is not None and _is(folder, together) and (folder / COMPLETE).exists():
                try:
                    yield folder
                finally:
                    _leave(folder, together)
                return
        time.sleep(LOOK_S)


def remove_left_folders() -> None:
    """Removes the folders that no living process uses."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as abandoned:
            if abandoned is not None:
                shutil.rmtree(left, ignore_errors=True)


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    if (folder / COMPLETE).exists():
        return
    for left in folder.iterdir():  # of a process that was killed while it filled it
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        fill(folder)
        (folder / COMPLETE).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _leave(folder: Path, lock: int) -> None:
    with contextlib.suppress(OSError):  # others use it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _is(folder: Path, opened: int) -> bool:
    """Whether this is the folder that was opened, not another in its place."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(folder.lstat(), os.fstat(opened))
    return False


def _make(folder: Path) -> None:
    """Makes a folder unless it is there. PermissionError when it is another user's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # its last user has just removed it
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is another user's; remove it, or name another place with TMPDIR")


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[int | None]:
    """Within, this process holds a lock on a folder, by this descriptor; None: others have it, or it is gone"""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(opened, how)
        except OSError:
            yield None
        else:
            yield opened
    finally:
        os.close(opened)
