"""Commands with many options: a record has them all, once."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Record = TypeVar("Record")


def takes(record: type[Record]) -> Callable[[Callable[[str, Record], None]], Callable[..., None]]:
    """Makes the fields of a dataclass the options of a command that takes an argument and the record of what was given.
    A field's type is Annotated with typer's option; its default is the option's."""
    hints = get_type_hints(record, include_extras=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(record)  # type: ignore[arg-type]
    ]

    def decorate(command: Callable[[str, Record], None]) -> Callable[..., None]:
        (argument, _) = inspect.signature(command, eval_str=True).parameters.values()

        def called(**given: Any) -> None:
            command(given.pop(argument.name), record(**given))

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        parameters = [argument, *options]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What `sampo evaluate` takes besides a run or a folder."""

    versions: Annotated[str | None, typer.Option(help="Numbers or labels, with commas.", show_default="base,final")] = (
        None
    )
    tasks: Annotated[
        str, typer.Option(help="Of gsm8k, ifeval, piqa, mmlu, truthfulqa_mc1, alpaca_eval, ifbench; with commas.")
    ] = "gsm8k,ifeval,truthfulqa_mc1"
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task, for trials.", show_default="all")] = (
        None
    )
    data: Annotated[
        Path | None, typer.Option(help="Folder with data sets as lm-eval names them.", show_default="libraries' caches")
    ] = None
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of the run's; `new`: start one.", show_default="the live one, else a new one"),
    ] = None
    out: Annotated[str | None, typer.Option(help="Where results go.", show_default="RUN_OR_FOLDER")] = None
    judge: Annotated[
        Path | None, typer.Option(help="YAML file that says who judges alpaca_eval.", show_default=False)
    ] = None
    alpaca_data: Annotated[Path | None, typer.Option(help="Folder with its official files.", show_default=False)] = None
    llama3_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of Llama 3's, in whose tokens it counts lengths.", show_default=False)
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Of its judgements, for their spread.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Of shots and answers.")] = 1234
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.", show_default="the task's")] = None
    at_once: Annotated[int, typer.Option(min=1, help="Tasks at a time.")] = 2
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight of each task.")] = 32
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked; ask and start nothing.")] = False

    @property
    def version_names(self) -> list[str]:
        return _names(self.versions or "")

    @property
    def task_names(self) -> list[str]:
        return _names(self.tasks)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
