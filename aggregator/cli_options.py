"""Options that the commands share, and the files and the database that they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from aggregator.assembly import AggregatorFiles
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.adapters.files import write_atomic
from fl_protocol.errors import ConfigError

Config = Annotated[Path, typer.Option(help="Path of aggregator.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Ca = Annotated[Path, typer.Option(help="Folder of the CA's certificate and key.")]
Out = Annotated[Path, typer.Option(help="Folder for the files.")]
Task = Annotated[str, typer.Argument(help="Name of the task.", show_default=False)]


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files for everybody to read, in place of those that are there.

    Args:
        folder: made where missing; named by ``--out``.
        files: content by name.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(folder / name, data, mode=0o644)
    except OSError as error:
        raise ConfigError(f"--out {folder}: the files cannot be written ({error.strerror})") from error


@contextmanager
def opened(config: Path) -> Iterator[tuple[AggregatorFiles, AggregatorStore]]:
    """A configuration, and the database that `covey-aggregator init` made, closed in the end.

    Raises:
        ConfigError: the configuration, or what it names, cannot be used.
        DatabaseError: there is no database, or it fails.
    """
    files = AggregatorFiles.load(config)
    store = files.open_store(create=False)
    try:
        yield files, store
    finally:
        store.close()
