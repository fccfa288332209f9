"""A policy replica's process and the node that it is on: local copies of folders, and the end of the process."""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from sampo_ray.run.storage import Place

logger = logging.getLogger("ray.serve")  # the one that Serve sends to its log files
T = TypeVar("T")


def local_folder(url: str) -> str:
    """The path of a folder on this machine. A remote one is copied, and the copy stays until the machine removes it."""
    place = Place(url)
    if place.local:
        return place.path
    scratch = Path(tempfile.mkdtemp(prefix="sampo-"))
    with place.on_disk() as folder:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
    return str(scratch)


@asynccontextmanager
async def in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves a blocking context manager without blocking the event loop."""
    value = await asyncio.to_thread(context.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def end_process(reason: str) -> NoReturn:
    """Ends this replica and its engine at once. Serve starts another, which is ready once it holds current weights."""
    logger.critical("this replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)  # Ray kills the processes that this one started


def end_process_with(task: asyncio.Task[None]) -> asyncio.Task[None]:
    """Has the process end when the task ends other than by being cancelled: a replica must not live on without it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            end_process(f"{task.get_coro()} ended: {task.exception()!r}")

    task.add_done_callback(ended)
    return task
