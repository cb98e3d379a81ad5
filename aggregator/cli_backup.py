"""The commands ``covey-aggregator backup`` and ``restore``."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from aggregator import restore as restoring
from aggregator.assembly import AggregatorFiles
from aggregator.audit.log import AuditEvent, append, local_actor
from aggregator.backup import backup as make_backup
from aggregator.certificates import RevocationList, read_crl
from aggregator.cli_options import Config, opened
from aggregator.command_line import examples, progress_bar
from aggregator.errors import AggregatorError
from aggregator.lost_sums import LostSums
from fl_protocol.adapters.config_files import read_file, relative_to_config
from fl_protocol.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command(epilog=examples("backup --config aggregator.toml --out monday.backup"))(backup)
    app.command(
        epilog=examples(
            "restore monday.backup --config aggregator.toml",
            "restore monday.backup --config aggregator.toml --after-round 4711 --crl broker/crl.pem",
            "restore monday.backup --config aggregator.toml --sums-lost gait=12 --sums-lost sleep=0",
        )
    )(restore)


def backup(config: Config, out: Annotated[Path, typer.Option(help="File to write; it must not exist.")]) -> None:
    """Write devices, tasks, models, rounds and receipts to one file, while the service runs.

    The signing key is not in it: keep a copy of that file apart. Neither are rounds' keys, nor updates of a round that
    is open.
    """
    with opened(config) as (_, store), progress_bar() as tell:
        done = make_backup(store.database, store.blobs, out, now_s=time.time(), progress=partial(tell, "backing up"))
        told = AuditEvent(time.time(), local_actor(), "database.backed_up", "", {"rows": done.rows})
        with store.database.transaction() as connection:
            append(connection, told)
    typer.echo(f"{out}: {done.rows} rows and {done.blobs} models and other large values, {done.num_bytes} bytes")


def restore(
    config: Config,
    backup_file: Annotated[Path, typer.Argument(metavar="BACKUP", help="File that `backup` wrote.")],
    after_round: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Newest round that any device may have seen; default: 1000 above the backup's.",
        ),
    ] = None,
    sums_lost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]N",
            help="Sums that helpers answered since the backup (covey-helper audit), of tasks with the engine secure.",
        ),
    ] = None,
    crl: Annotated[
        Path | None,
        typer.Option(help="The broker's list of revoked certificates as it was last: who is on it stays out."),
    ] = None,
) -> None:
    """Restore a backup into the empty database that the configuration names; another kind of database will do.

    The backup is checked whole first. The round that was open is given up, and every task that was going on is paused
    until `covey-aggregator task resume`.
    """
    files = AggregatorFiles.load(config)
    listed = None if crl is None else _read_list(files, crl)
    store = files.open_store()
    with progress_bar() as tell:
        done = restoring.restore(
            backup_file,
            store.database,
            store.blobs,
            now_s=time.time(),
            after_round=after_round,
            sums_lost=LostSums.parse(sums_lost or []),
            actor=local_actor(),
            listed=listed,
            progress=partial(tell, "restoring"),
        )
    store.close()
    made = datetime.fromtimestamp(done.created_s, timezone.utc)
    typer.echo(f"restored {done.rows} rows and {done.blobs} models and other large values of {made:%Y-%m-%d %H:%M} UTC")
    for task, number in sorted(done.numbers.items()):
        lost = done.sums_lost.get(task, 0)
        counted = f"; its account has {lost} lost sums" if lost else ""
        typer.echo(f"{task}: rounds go on after {number}{counted}; see covey-aggregator task show {task}")
    for task in done.sums_unsaid:
        typer.echo(
            f"{task}: privacy spent tells too little, without the sums that helpers were asked for since; covey-helper "
            "audit tells how many, and restoring with --sums-lost into another empty database counts them"
        )
    if done.revoked is not None:
        typer.echo(
            f"thrown out again: {done.revoked.devices} devices, and {done.revoked.certificates} certificates whose "
            "devices the backup does not know"
        )
    else:
        typer.echo(
            f"who was thrown out after {made:%Y-%m-%d %H:%M} UTC is in again, since a backup cannot know it; if the "
            "broker's list of revoked certificates is still there, restore with --crl into another empty database"
        )


def _read_list(files: AggregatorFiles, path: Path) -> RevocationList:
    """A list that the study's CA has signed. Raises ConfigError."""
    ca = files.config.broker.ca
    if ca is None:
        raise ConfigError(f"configuration {files.path}: --crl needs broker.ca, the certificate of whom signed the list")
    certificate = read_file(relative_to_config(files.path, ca), "broker.ca")
    try:
        return read_crl(read_file(path, "--crl"), certificate)
    except AggregatorError as error:
        raise ConfigError(f"--crl {path}: {error}") from error
