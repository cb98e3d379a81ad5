"""Options that the helper's commands share, and the store that they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from aggregator import command_line
from aggregator.helper.assembly import HelperFiles
from aggregator.helper.helper_store import HelperStore

Config = Annotated[Path, typer.Option(help="Path of helper.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def examples(*lines: str) -> str:
    """The end of a command's help, as `aggregator.command_line.examples` writes it."""
    return command_line.examples(*lines).replace("covey-aggregator", "covey-helper")


@contextmanager
def opened(config: Path) -> Iterator[tuple[HelperFiles, HelperStore]]:
    """A configuration and its store, closed in the end. Raises ConfigError, DatabaseError."""
    files = HelperFiles.load(config)
    with files.store() as store:
        yield files, store
