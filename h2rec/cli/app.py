"""The commands, and what is common to all of them: how errors are shown."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from h2rec._version import __version__
from h2rec.cli.console import errors
from h2rec.cli.demo import demo
from h2rec.cli.evaluate import evaluate
from h2rec.cli.export import export
from h2rec.cli.plan import plan
from h2rec.cli.recommend import recommend
from h2rec.cli.refit import refit
from h2rec.cli.tokenize import tokenize
from h2rec.cli.train import train

# What the library raises for a wrong argument, file or installation. Anything else is our mistake, with a traceback.
_EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)


class _Commands(TyperGroup):
    """Shows what went wrong without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
        except _EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            message = str(error) or type(error).__name__
            errors.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
            _leave_if_launched(1)
            raise typer.Exit(1) from error
        _leave_if_launched(0)
        return result


def _leave_if_launched(code: int) -> None:
    """Ends one of several processes without tidying up, for which Python takes seconds. Its connections close then.

    By these the others hear of it, in turn: who waits for a process that has heard of it hears when that one ends.
    Also, threads of gloo outlive the group, and Python aborts if one of them lets go of a tensor while it ends.
    """
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        sys.stdout.flush()
        os._exit(code)


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"h2rec {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Recommend with semantic and hash IDs together: from a catalog and a log to a trained model.

    \b
    Example, from nothing to a table and a report in a few minutes:
        h2rec demo

    Every command shows examples of its own: h2rec train --help
    """


@app.command()
def config() -> None:
    """Show what of h2rec is built, what is usable here, and why the rest is not.

    \b
    Example:
        h2rec config
    """
    import h2rec

    h2rec.show_config()


for command in (tokenize, train, evaluate, refit, recommend, export, plan, demo):
    app.command()(command)
