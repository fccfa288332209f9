"""`sampo versions` and the commands that change serving.json, which the process that serves the run follows at once."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sampo_ray.run.commands import Command
    from sampo_ray.run.serving import Follow
    from sampo_ray.run.storage import Place
    from sampo_ray.run.versions import VersionInfo

app = typer.Typer()
ADAPTER_HELP = "LoRA adapters of your own, served on the version they were made for."
adapters = typer.Typer(help=ADAPTER_HELP, no_args_is_help=True)
app.add_typer(adapters, name="adapter")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run directory.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="A number, or a label such as round-2.")]


@app.command()
def versions(run: RunArgument) -> None:
    """Lists a run's versions: which is live, pinned or refused, and why."""
    from rich.console import Console
    from rich.table import Table

    from sampo_ray.evaluation.probe import brief, results_by_version
    from sampo_ray.run.report import read_reports, worst
    from sampo_ray.run.serving import listing, read_serving

    place, infos, follow = opened(run)
    state, reports = read_serving(place, follow), read_reports(place)
    probes = results_by_version(place)
    columns = ["version", "labels", "state", "loss", "margin", "chosen", *(["probe"] if probes else []), "published"]
    table = Table(*columns)
    for entry in listing(state, infos, worst(reports)):
        numbers = [entry.metrics.get(name) for name in ("loss", "margin", "chosen_tokens")]
        shown = ("-" if n is None else f"{n:{form}}" for n, form in zip(numbers, (".3f", "+.3f", ".0f"), strict=True))
        when = "-" if entry.created is None else f"{datetime.fromtimestamp(entry.created):%m-%d %H:%M}"
        state_and_why = entry.state + (f": {entry.reason}" if entry.reason else "")
        probed = [brief(probes.get(entry.version))] if probes else []
        table.add_row(str(entry.version), ", ".join(entry.labels), state_and_why, *shown, *probed, when)
    Console().print(table)
    typer.echo(f"follow: {state.follow}{' (held)' if state.held else ''}")
    for trouble in (trouble for report in reports for trouble in report.troubles):
        since, last = (f"{datetime.fromtimestamp(when):%H:%M:%S}" for when in (trouble.since, trouble.last))
        typer.echo(f"{trouble.what}: {trouble.reason} ({trouble.tries} times since {since}, last {last})")


@app.command()
def promote(run: RunArgument, version: VersionArgument) -> None:
    """Makes a version live and holds it there; `latest` follows training again."""
    from sampo_ray.run.commands import Promote

    carry_out(run, Promote(version))


@app.command()
def rollback(run: RunArgument) -> None:
    """Makes the version live that was live before, and holds it there."""
    from sampo_ray.run.commands import Rollback

    carry_out(run, Rollback())


@app.command()
def pin(run: RunArgument, version: VersionArgument) -> None:
    """Serves a version as `policy@VERSION` beside the live one, and keeps it on disk."""
    from sampo_ray.run.commands import Pin

    carry_out(run, Pin(version))


@app.command()
def unpin(run: RunArgument, version: VersionArgument) -> None:
    """Stops serving a pinned version beside the live one."""
    from sampo_ray.run.commands import Unpin

    carry_out(run, Unpin(version))


@app.command()
def label(run: RunArgument, version: VersionArgument, name: Annotated[str, typer.Argument(metavar="LABEL")]) -> None:
    """Gives a version a label; requests for `policy@LABEL` get it while it is pinned or live."""
    from sampo_ray.run.commands import Label

    carry_out(run, Label(version, name))


@adapters.command("add")
def add_adapter(
    run: RunArgument,
    folder: Annotated[str, typer.Argument(help="The adapter as peft's save_pretrained writes it (safetensors).")],
    name: Annotated[str, typer.Argument(help="Requests for policy@NAME use it.")],
    base: Annotated[str, typer.Option(help="The version it was made for.")] = "base",
) -> None:
    """Copies an adapter into the run directory and serves it."""
    from sampo_ray.errors import VersionError
    from sampo_ray.run.adapters import read_adapter
    from sampo_ray.run.serving import (
        Adapter,
        add_adapter,
        all_labels,
        check_adapter_name,
        edit_serving,
        read_serving,
    )
    from sampo_ray.run.versions import find, version_folder

    place, infos, follow = opened(run)
    state = read_serving(place, follow)
    version = find(base, all_labels(state, infos))
    if infos[version].adapters:
        raise VersionError(f"version {version} is adapters itself; name a version that is a whole model")
    check_adapter_name(state, name)
    plain = read_adapter(folder, version_folder(place.at("versions").url, version))
    plain.write(place)
    adapter = Adapter(base=version, rank=plain.rank, content=plain.content)
    edit_serving(place, lambda now: add_adapter(now, name, adapter), follow)
    typer.echo(f"policy@{name}: served on version {version}, which is pinned for it")


@adapters.command("remove")
def remove_adapter(run: RunArgument, name: Annotated[str, typer.Argument()]) -> None:
    """Stops serving an adapter and removes it from the run directory."""
    from sampo_ray.run.serving import edit_serving, read_serving, remove_adapter
    from sampo_ray.run.storage import Place
    from sampo_ray.run.versions import adapter_folder

    place, _, follow = opened(run)
    removed = read_serving(place, follow).adapters.get(name)
    left = edit_serving(place, lambda now: remove_adapter(now, name), follow).adapters.values()
    if removed and removed.content not in {adapter.content for adapter in left if adapter.content}:
        Place(adapter_folder(place.url, name, removed.content)).remove()
    typer.echo(f"policy@{name} is no longer served")


def carry_out(run: str, command: "Command") -> None:
    """Changes what a run serves and prints what is served then."""
    from sampo_ray.run.commands import apply_once, new_id
    from sampo_ray.run.serving import edit_serving

    (place, infos, follow), id = opened(run), new_id()
    state = edit_serving(place, lambda now: apply_once(now, infos, id, command), follow)
    held = ", held there" if state.held else f", following {state.follow}"
    live = "nothing" if state.live is None else f"version {state.live}"
    pinned = ", ".join(map(str, state.all_pinned)) or "none"
    typer.echo(f"live: {live}{held}; pinned: {pinned}")


def opened(run: str) -> "tuple[Place, dict[int, VersionInfo], Follow]":
    """A run's place, its versions on disk with what their version.json says, and what its live policy follows."""
    from sampo_ray.errors import ConfigError
    from sampo_ray.run.serving import read_serve_config
    from sampo_ray.run.storage import Place, absolute
    from sampo_ray.run.versions import complete_versions, read_info, version_folder

    place = Place(absolute(run))
    if not place.at("manifest.json").exists():
        raise ConfigError(f"{run!r} holds no run (no manifest.json); name a run directory")
    url = place.at("versions").url
    infos = {version: read_info(version_folder(url, version)) for version in complete_versions(url)}
    return place, infos, read_serve_config(place).follow
