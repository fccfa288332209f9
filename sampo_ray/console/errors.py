"""How the command line ends when something goes wrong."""

import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from sampo_ray.errors import UserError


class Commands(TyperGroup):
    """A group of commands that prints a UserError as one message, without a stack, and ends with status 1."""

    def invoke(self, ctx: Any) -> object:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except UserError as error:
            # An error of a Ray actor prints as the actor's stack; its cause is the error that was raised there.
            typer.echo(f"error: {getattr(error, 'cause', error)}", err=True)
            raise typer.Exit(1) from None
