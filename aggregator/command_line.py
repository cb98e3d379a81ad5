"""What the typer commands share: ``--version``, and errors as one sentence with an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from fl_protocol.adapters.software import software_version
from fl_protocol.errors import CoveyError

ExitCodes = Sequence[tuple[type[CoveyError], int]]


def make_app(name: str, text: str) -> typer.Typer:
    """A typer application with ``--version``.

    Args:
        name: of the command.
        text: its help, with examples.
    """
    # Tracebacks stay Python's own: typer's would print local variables, keys among them.
    app = typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {software_version()}")
            raise typer.Exit

    @app.callback()
    def options(
        _version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and stop."
        ),
    ) -> None:
        """Options of every command."""

    return app


def run_app(app: Callable[[], Any], name: str, exit_codes: ExitCodes) -> None:
    """Run a command; an error of ours is one sentence on standard error and the first exit code that fits."""
    try:
        app()
    except CoveyError as error:
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(next(code for kind, code in exit_codes if isinstance(error, kind)))
