"""The command line `sampo`: what each command takes. What a command does is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sampo_ray.console.compare import app as compare
from sampo_ray.console.keys import app as keys
from sampo_ray.console.options import EvaluateOptions, takes
from sampo_ray.console.signals import orderly_end
from sampo_ray.console.versions import app as versions
from sampo_ray.errors import UserError


class Commands(TyperGroup):
    """A group of commands that prints a UserError as one message, without a stack, and ends with status 1."""

    def invoke(self, ctx: Any) -> object:
        with orderly_end() as end:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise typer.Exit(end.status) from None
            except UserError as error:
                # An error of a Ray actor prints as the actor's stack; its cause is the error that was raised there.
                typer.echo(f"error: {getattr(error, 'cause', error)}", err=True)
                raise typer.Exit(1) from None


app = typer.Typer(
    name="sampo",
    help="Iterative SamPO as a service on Ray.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
feedback = typer.Typer(help="Votes of users on answers.", no_args_is_help=True)
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value ...", show_default=False)]
RunDirectory = Annotated[str, typer.Argument(metavar="RUN", help="The run directory.")]
Pairs = Annotated[str, typer.Argument(metavar="OUT.jsonl", help="A path or fsspec URL; an existing file is replaced.")]


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe", show_default=False)] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Continue the run in this directory.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the configuration, start nothing.")] = False,
    serve: Annotated[bool, typer.Option(help="Keep the live endpoint up after the run has ended.")] = False,
) -> None:
    """Runs a recipe, or continues a run that was interrupted."""
    from sampo_ray.console import session

    changes = [*([str(recipe)] if recipe and resume else []), *(overrides or [])]
    if dry_run:
        session.show(recipe, changes, resume)
    elif resume:
        session.resume(resume, changes, serve)
    else:
        session.train(recipe, changes, serve)


@app.command()
def demo(
    serve: Annotated[bool, typer.Option(help="Keep the live endpoint up afterwards.")] = False,
    directory: Annotated[Path, typer.Option("--dir", help="Where the demo's run directories go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, model and runs.")] = 0,
) -> None:
    """Trains, serves and compares DPO, Iterative DPO and Iterative SamPO on a small task on this machine."""
    from sampo_ray.console.demo import run_demo

    run_demo(directory, seed, serve)


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Overrides = None,
) -> None:
    """Runs a recipe as a job on a Ray cluster and follows its log."""
    from rich.console import Console

    from sampo_ray.cluster.submit import submit as submit_job

    raise typer.Exit(submit_job(recipe, overrides or [], address, Console()))


@app.command()
def serve(run: RunDirectory, overrides: Overrides = None) -> None:
    """Serves a run without training it; follows a run that another process trains."""
    from sampo_ray.console import session

    session.serve(run, overrides or [])


@app.command()
@takes(EvaluateOptions)
def evaluate(
    where: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run directory, or a model's folder.")],
    options: EvaluateOptions,
) -> None:
    """Scores versions of a run, or a model's folder, in the tasks of the model card."""
    from sampo_ray.console.evaluate import evaluate as evaluate_target

    evaluate_target(where, options)


app.add_typer(versions)
app.add_typer(compare)
app.add_typer(keys, name="keys")
app.add_typer(feedback, name="feedback")


@feedback.command()
def export(run: RunDirectory, out: Pairs) -> None:
    """Writes the preference pairs that a run's votes make, in a form that `data.train` reads."""
    from sampo_ray.errors import ConfigError
    from sampo_ray.run.feedback import as_jsonl, pairs_from, read_votes
    from sampo_ray.run.storage import Place, absolute

    votes = read_votes(Place(absolute(run)))
    if not votes:
        raise ConfigError(f"{run!r} has no feedback (nothing in feedback/votes); name a run that has votes")
    rows, left = pairs_from(votes)
    Place(absolute(out)).write(as_jsonl(rows))
    without = ", ".join(f"{n} {reason}" for reason, n in left.items())
    typer.echo(f"{len(rows)} pairs from {len(votes)} votes" + (f" (without: {without})" if without else ""))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
