"""API keys in a file, with what each one allows at the endpoint.

The file is a list of entries, JSON where its name ends in `.json` and YAML otherwise:

    - {name: web-shop, sha256: 5f1c..., scopes: [use], created: 2026-01-31}
    - {name: operator, sha256: 90ab..., scopes: [use, admin], created: 2026-01-31}

Only digests are stored. Plain SHA-256 is enough: a key is 256 random bits, which nobody can guess from its digest, and
a slow password hash would cost time at every request.
"""

import datetime
import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sampo_ray.errors import KeysError

Scope = Literal["use", "admin"]
PREFIX = "sampo-"
"""How keys begin, so that scanners for leaked secrets recognise them."""


class Key(BaseModel):
    """One entry of the file. `admin` includes `use`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100, pattern=r"^[\w.@-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    created: datetime.date | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


_LIST = TypeAdapter(list[Key])


def digest(key: str) -> str:
    """SHA-256 of a key in hex, which is all that is stored of it."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str, scopes: Iterable[Scope], today: datetime.date) -> tuple[str, Key]:
    """A new random key, to be shown once, and its entry. KeysError for an invalid name."""
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        return key, Key(name=name, sha256=digest(key), scopes=frozenset(scopes), created=today)
    except ValidationError:
        raise KeysError(
            f"name {name!r}: give 1 to 100 letters, digits, '_', '.', '@' or '-', such as web-shop"
        ) from None


def is_json(file: str) -> bool:
    """Whether a file of this name is JSON and not YAML."""
    return file.endswith(".json")


def parse(content: bytes, json_file: bool) -> tuple[Key, ...]:
    """The entries of a keys file. KeysError for an invalid file, with none of its content."""
    try:
        text = content.decode()
        tree = json.loads(text) if json_file else yaml.safe_load(text)
    except (ValueError, RecursionError):
        raise KeysError(f"not valid {'JSON' if json_file else 'YAML'}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise KeysError("not valid YAML" + (f" (line {mark.line + 1})" if mark else "")) from None
    if not isinstance(tree, list):
        raise KeysError("must be a list of entries {name, sha256, scopes}; an empty list is []")
    try:
        keys = tuple(_LIST.validate_python(tree))
    except ValidationError as error:
        raise KeysError(_mistake(error)) from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        twice = next((at for at, value in enumerate(values) if value in values[:at]), None)
        if twice is not None:
            raise KeysError(f"entry {twice + 1}: its {field} is that of an entry before it")
    return keys


def render(keys: Iterable[Key], json_file: bool) -> bytes:
    """The file's content, from which `parse` gets the same keys."""
    tree: list[dict[str, object]] = []
    for key in keys:
        entry = key.model_dump(mode="json", exclude_none=True)
        tree.append({**entry, "scopes": sorted(entry["scopes"], reverse=True)})
    text = json.dumps(tree, indent=2) if json_file else yaml.safe_dump(tree, sort_keys=False)
    return f"{text.rstrip()}\n".encode()


def added(keys: tuple[Key, ...], key: Key) -> tuple[Key, ...]:
    """The keys and one more. KeysError if its name is taken: `revoked` tells keys apart by their names."""
    if any(known.name == key.name for known in keys):
        raise KeysError(f"name {key.name!r}: there is a key of that name; revoke it first, or choose another name")
    return (*keys, key)


def revoked(keys: tuple[Key, ...], name: str) -> tuple[Key, ...]:
    """The keys without the one of that name. KeysError if there is none."""
    left = tuple(key for key in keys if key.name != name)
    if len(left) == len(keys):
        known = ", ".join(sorted(key.name for key in keys)) or "none"
        raise KeysError(f"name {name!r}: no key of that name; the file has: {known}")
    return left


def _mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    position, *rest = first["loc"]
    field = str(rest[0]) if rest and rest[0] in Key.model_fields else ""
    wanted = {
        "name": "must be 1 to 100 letters, digits, '_', '.', '@' or '-'",
        "sha256": "must be 64 hex digits in lower case, the SHA-256 of the key",
        "scopes": "must be a list of 'use' and 'admin'",
        "created": "must be a date",
    }
    where = f"entry {int(position) + 1}"
    return f"{where}: {field} {wanted[field]}" if field else f"{where}: must have name, sha256, scopes and no more"
