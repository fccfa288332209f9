"""`sampo keys`: the keys file of an endpoint. A running endpoint reads a changed file within about a second."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sampo_ray.errors import KeysError

if TYPE_CHECKING:
    from sampo_ray.config.keys import Key
    from sampo_ray.run.storage import Place

app = typer.Typer(help="API keys of the endpoint, in the file that serve.keys_file names.", no_args_is_help=True)
File = Annotated[str, typer.Argument(help="The keys file, .yaml or .json: a local path or any fsspec URL.")]
Name = Annotated[str, typer.Option(help="Name of the key's owner; shown in lists, not secret.")]
Scope = Annotated[Literal["use", "admin"], typer.Option(help="What the key allows; `admin` includes `use`.")]

LOCK_SECONDS = 30


@app.command()
def add(file: File, name: Name, scope: Scope = "use") -> None:
    """Makes a key, stores its digest and prints the key once."""
    from sampo_ray.config.keys import added, new_key

    with _opened(file) as place:
        key, entry = new_key(name, {scope}, datetime.date.today())
        _change(place, lambda keys: added(keys, entry), create=True)
    typer.echo(key)
    typer.echo(f"{file}: added {name!r}; the key is shown this once and cannot be recovered", err=True)


@app.command("list")
def list_keys(file: File) -> None:
    """Lists names, scopes and dates of the keys."""
    with _opened(file) as place:
        for key in _read(place):
            typer.echo(f"{key.name}\t{','.join(sorted(key.scopes, reverse=True))}\t{key.created or '-'}")


@app.command()
def revoke(file: File, name: Name) -> None:
    """Removes a key; the endpoint refuses it within about a second."""
    from sampo_ray.config.keys import revoked

    with _opened(file) as place:
        _change(place, lambda keys: revoked(keys, name), create=False)
    typer.echo(f"{file}: revoked {name!r}", err=True)


def _change(place: Place, change: Callable[[tuple[Key, ...]], tuple[Key, ...]], create: bool) -> None:
    import filelock

    from sampo_ray.config.keys import is_json, render

    with filelock.FileLock(f"{place.path}.lock", timeout=LOCK_SECONDS) if place.local else contextlib.nullcontext():
        keys = () if create and not place.exists() else _read(place)
        place.write(render(change(keys), is_json(place.url)))


def _read(place: Place) -> tuple[Key, ...]:
    from sampo_ray.config.keys import is_json, parse

    return parse(place.read(), is_json(place.url))


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Place]:
    """The file's place. What goes wrong with it becomes a KeysError that names the file."""
    from sampo_ray.run.storage import Place, absolute

    try:
        yield Place(absolute(file))
    except TimeoutError:
        raise KeysError(f"{file}: another process has been changing it for {LOCK_SECONDS} s; try again") from None
    except (KeysError, OSError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        raise KeysError(f"{file}: {reason}") from None
