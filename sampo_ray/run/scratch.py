"""Scratch folders on this machine. One whose process was killed is removed by the next process that makes one."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "sampo-scratch-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder among the machine's temporary files, which is gone afterwards.

    This process holds a lock on it until then. The kernel frees the lock however the process ends, which tells folders
    in use from those that were left.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with _locked(folder, fcntl.LOCK_EX) as mine:
            if mine and folder.exists():  # else another process took it for one that was left
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


def _remove(left: Path) -> None:
    """Removes a folder that no living process holds."""
    with _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as abandoned:
        if abandoned:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Within, this process holds the lock on a folder; False: it is another's, another user's, or the folder is gone"""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(opened, how)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(opened)
