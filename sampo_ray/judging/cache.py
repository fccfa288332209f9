"""Keeps a judge's answers by the content of their calls: one small file each, which several processes may share."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

from pydantic import ValidationError

from sampo_ray.judging.verdicts import Reply


class Files(Protocol):
    """A folder whose files are replaced atomically, such as `run.storage.Place`."""

    def at(self, *names: str) -> "Files": ...

    def read(self) -> bytes: ...

    def write(self, content: bytes) -> None: ...


class Cache:
    """Answers by call. Prompts and answers that were judged are in the file's name as a digest only."""

    def __init__(self, folder: Files) -> None:
        self._folder = folder

    def get(self, key: str) -> Reply | None:
        """The answer to the call; None if it is not known, or its file is damaged."""
        with contextlib.suppress(OSError, ValidationError):
            return Reply.model_validate_json(self._file(key).read())
        return None

    def put(self, key: str, reply: Reply) -> None:
        self._file(key).write(reply.model_dump_json().encode())

    def _file(self, key: str) -> Files:
        return self._folder.at(key[:2], f"{key[2:]}.json")


def key_of(url: str, request: Mapping[str, object], repeat: int) -> str:
    """Digest of all that a call sends but its credentials, and of which repeat it belongs to."""
    text = json.dumps([url, request, repeat], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
