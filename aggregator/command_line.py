"""What the typer commands share: ``--version``, tables, JSON, and errors as one sentence with an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import msgspec
import typer
from rich import box
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl_protocol.adapters.software import software_version
from fl_protocol.errors import CoveyError
from fl_protocol.terminal import visible

ExitCodes = Sequence[tuple[type[CoveyError], int]]
_WIDTH_IN_FILES = 200
"""Columns of a table that no terminal shows."""


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


def make_group(text: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode="markdown")


def examples(*lines: str) -> str:
    """The end of a command's help: how it is typed, each line without the program's name."""
    return "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *(f"covey-aggregator {line}" for line in lines)])


def run_app(app: Callable[[], Any], name: str, exit_codes: ExitCodes) -> None:
    """Run a command; an error of ours is one sentence on standard error and the first exit code that fits."""
    try:
        app()
    except CoveyError as error:
        # Security: some of it may be what came from outside, such as a name in a bundle that nobody vouches for.
        sys.stderr.write(f"{visible(f'{name}: {error}')}\n")
        sys.exit(next(code for kind, code in exit_codes if isinstance(error, kind)))


def say_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def say_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers stand to the right, and nothing in it is taken for markup."""
    plain_console().print(make_table(title, columns, rows))


def say_list(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, as_json: bool) -> None:
    """Print a list as a table, or as JSON: an object a row, with the columns as keys."""
    if as_json:
        say_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        say_table(title, columns, rows)


def plain_console() -> Console:
    """Standard output, for tables; wide where no terminal shows them."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_IN_FILES
    return console


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; numbers stand to the right, and what rich can draw is drawn as it is."""
    filled = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        is_text = any(_is_text(row[number]) for row in filled)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in filled:
        table.add_row(*row)
    return table


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, where that is a terminal; called with what is done, how much is, how much there is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _what, _done, _total: None
        return
    with Progress(console=console, transient=True) as bar:
        line = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)


def moment(at_s: float | None) -> str:
    """A Unix time for people, in UTC; empty for none."""
    return f"{datetime.fromtimestamp(at_s, timezone.utc):%Y-%m-%d %H:%M:%SZ}" if at_s is not None else ""


def span(seconds: float) -> str:
    """How long something is, for people: its largest unit of which there are two."""
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _cell(value: object) -> RenderableType:
    """What a cell shows; text stands there as it is."""
    if value is None:
        return ""
    if isinstance(value, ProgressBar):
        return value
    return Text(f"{value:.4g}" if isinstance(value, float) else str(value))


def _is_text(cell: RenderableType) -> bool:
    """Whether a cell is no number."""
    shown = str(cell) if isinstance(cell, Text) else ""
    return bool(shown) and not shown[0].isdigit() and shown[0] not in "-+."
