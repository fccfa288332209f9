"""`sampo compare`, `sampo card` and `sampo push`: what a run's evaluations show, and how its model is given away."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from sampo_ray.evaluation.comparison import Comparison
    from sampo_ray.evaluation.style import Style

app = typer.Typer()


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, RUN@VERSION, or exported folders.")],
    names: Annotated[str | None, typer.Option(help="What to call them: A,B,...", show_default=False)] = None,
    out: Annotated[str | None, typer.Option(help="Write one self-contained HTML page.", show_default=False)] = None,
    style_control: Annotated[
        bool, typer.Option("--style-control", help="Add win rates at equal length and markdown (AlpacaEval 2).")
    ] = False,
) -> None:
    """Compares evaluated runs: scores with intervals, differences to the base, win rate against length."""
    from rich.console import Console

    from sampo_ray.evaluation.comparison import compare as compared
    from sampo_ray.evaluation.page import page
    from sampo_ray.evaluation.style import style_controlled
    from sampo_ray.evaluation.subjects import read_results, with_names
    from sampo_ray.run.storage import Place, absolute

    named = [name.strip() for name in names.split(",")] if names else []
    found, console = compared(with_names([read_results(run) for run in runs], named)), Console()
    console.print(scores(found))
    if any(row.differences for row in found.rows):
        console.print(differences(found))
    style = style_controlled(found.rows) if style_control else None
    if style is not None:
        console.print(at_equal_style(style))
    for note in found.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    if out is not None:
        Place(absolute(out)).write(page(found, style).encode())
        typer.echo(f"page: {out}")


@app.command()
def card(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory.")],
    name: Annotated[str | None, typer.Option(help="The model's name. Default: base model and method.")] = None,
) -> None:
    """Writes the Hugging Face model card (README.md) beside the run's newest exported weights."""
    from sampo_ray.evaluation.card import write_card

    typer.echo(f"card: {write_card(run, name).url}")


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory, or an exported folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option(help="Only its owners may see it.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print what would go, send nothing.")] = False,
) -> None:
    """Uploads the newest exported model with its card to the Hugging Face hub."""
    from sampo_ray.errors import UserError
    from sampo_ray.evaluation.push import folder_of, plan
    from sampo_ray.evaluation.push import push as upload

    with folder_of(run).on_disk() as folder:
        found = plan(folder, repo)
        for name, size in found.files:
            typer.echo(f"{size:>15,}  {name}")
        typer.echo(
            f"{found.total:>15,}  bytes in all" + (f"; stays here: {', '.join(found.stays)}" if found.stays else "")
        )
        if dry_run:
            typer.echo(f"nothing was sent; would go to {repo}{' (private)' if private else ''}")
        else:
            try:
                url = upload(found, repo, private)
            except UserError:
                typer.echo(err=True)  # the library's progress bar leaves its line open
                raise
            typer.echo(f"pushed: {url}")


def scores(found: "Comparison") -> "Table":
    """Rows of methods; under each value its interval and what was published."""
    from rich.table import Table
    from rich.text import Text

    from sampo_ray.evaluation.shown import bracketed, published_value, value

    caption = "in brackets 95 % intervals; * not all samples of the benchmark"
    table = Table("", title="Scores", caption=caption, show_lines=True)
    for column in found.columns:
        table.add_column(Text(column.title + (" %" if column.unit == "share" else "")), justify="right")
    for row in found.rows:
        cells = []
        for column in found.columns:
            cell = row.cells.get(column.title)
            lines = [value(cell), bracketed(cell.score), published_value(cell)] if cell else ["-"]
            cells.append(Text("\n".join(line for line in lines if line)))
        table.add_row(Text(f"{row.name}\n{row.about}"), *cells)
    return table


def differences(found: "Comparison") -> "Table":
    """Rows of methods; each with its differences to the base."""
    from rich.table import Table
    from rich.text import Text

    from sampo_ray.evaluation.shown import change

    table = Table(
        "", title=Text(f"Differences to {found.against}"), caption="percentage points, tokens", show_lines=True
    )
    for column in found.columns:
        table.add_column(Text(column.title), justify="right")
    for row in found.rows:
        if not row.differences:
            continue
        cells = []
        for column in found.columns:
            gap = row.differences.get(column.title)
            cells.append(Text("\n".join(filter(None, [change(gap, column.unit), gap.why])) if gap else "-"))
        table.add_row(Text(row.name), *cells)
    return table


def at_equal_style(style: "Style") -> "Table":
    """Rows of methods; win rates as judged and at the reference's length and markdown."""
    from rich.table import Table
    from rich.text import Text

    added = ", ".join(f"{name} {weight:+.2f}" for name, weight in style.weights.items())
    caption = f"a standard deviation of each adds to the log-odds: {added}"
    table = Table("", "as judged %", "at equal style %", "answers", title="Win rate at equal style", caption=caption)
    for row in style.rows:
        controlled = f"{100 * row.rate:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        table.add_row(Text(row.name), f"{100 * row.raw:.1f}", controlled, str(row.count))
    return table
