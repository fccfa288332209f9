"""`sampo keys`: the keys file of an endpoint. A running endpoint takes a changed file up within about a second."""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Annotated

import filelock
import typer

from sampo_ray.config.keys import Key, Scope, added, is_json, new_key, parse, render, revoked
from sampo_ray.errors import KeysError
from sampo_ray.run.storage import Place, absolute

app = typer.Typer(help="API keys of the endpoint, in a file named by serve.keys_file.", no_args_is_help=True)
File = Annotated[str, typer.Argument(help="The keys file, .yaml or .json: a local path or any fsspec URL.")]
Name = Annotated[str, typer.Option(help="Whose key it is; shown in lists, never secret.")]


@app.command()
def add(
    file: File,
    name: Name,
    scope: Annotated[Scope, typer.Option(help="What it is for; `admin` includes `use`.")] = "use",
) -> None:
    """Makes a key, stores its digest, and prints the key, once."""
    with _readable_errors(file):
        key, entry = new_key(name, {scope}, datetime.date.today())
        _change(file, lambda keys: added(keys, entry), create=True)
        typer.echo(key)
        typer.echo(f"{file}: added {name!r}; the key is shown this once and cannot be recovered", err=True)


@app.command("list")
def list_keys(file: File) -> None:
    """Names, scopes and dates of the keys."""
    with _readable_errors(file):
        for key in _read(Place(absolute(file))):
            typer.echo(f"{key.name}\t{','.join(sorted(key.scopes, reverse=True))}\t{key.created or '-'}")


@app.command()
def revoke(file: File, name: Name) -> None:
    """Removes a key; the endpoint refuses it from about a second later on."""
    with _readable_errors(file):
        _change(file, lambda keys: revoked(keys, name), create=False)
        typer.echo(f"{file}: revoked {name!r}", err=True)


def _change(file: str, change: Callable[[tuple[Key, ...]], tuple[Key, ...]], create: bool) -> None:
    place = Place(absolute(file))
    with filelock.FileLock(f"{place.path}.lock", timeout=30) if place.local else contextlib.nullcontext():
        keys = () if create and not place.exists() else _read(place)
        place.write(render(change(keys), is_json(file)))


def _read(place: Place) -> tuple[Key, ...]:
    return parse(place.read(), is_json(place.url))


@contextlib.contextmanager
def _readable_errors(file: str) -> Iterator[None]:
    try:
        yield
    except (KeysError, OSError, filelock.Timeout) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        typer.echo(f"error: {file}: {reason}", err=True)
        raise typer.Exit(1) from None
