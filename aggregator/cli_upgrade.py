"""The command ``covey-aggregator upgrade``."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator import upgrade as upgrading
from aggregator.assembly import AggregatorFiles
from aggregator.audit.checkpoints import origin_of
from aggregator.audit.log import local_actor
from aggregator.audit.verification import LogKeys
from aggregator.cli_options import AsJson, Config
from aggregator.command_line import examples, progress_bar, say_json
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.migrations import newest_revision, of_revision
from fl_protocol.helper_config import pinned


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command(
        epilog=examples(
            "upgrade --config aggregator.toml",
            "upgrade --config aggregator.toml --backup /mnt/disk2/before.backup",
            "upgrade --config aggregator.toml --json",
        )
    )(upgrade)


def upgrade(
    config: Config,
    backup: Annotated[
        Path | None,
        typer.Option(help="File for the backup; it must not exist. Default: named by date, beside the configuration."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the database of an earlier version up to date, with a backup of what it was; all of it, or nothing.

    Stop every process that uses the database first. A database that is up to date is left alone.
    """
    files, now_s = AggregatorFiles.load(config), time.time()
    with closing(files.open_store(create=False, older="leave")) as store:
        planned = upgrading.plan(store.database)
        told: dict[str, Any] = {
            "from": planned.revision,
            "to": newest_revision(),
            "migrations": [one._asdict() for one in planned.steps],
            "backup": None,
        }
        if planned.steps and planned.empty:
            files.open_store().close()
        elif planned.steps:
            if not as_json:
                _say_planned(planned)
            path = backup or _default_name(config.parent, planned.revision, now_s)
            told |= _upgraded(files, store, path, now_s, as_json=as_json)
    if as_json:
        say_json(told)
    elif not planned.steps:
        typer.echo(f"nothing to do: the database is {of_revision(planned.revision)}, the newest there is")
    elif planned.empty:
        typer.echo(f"the database was empty; it has the tables of revision {newest_revision()} now")


def _upgraded(
    files: AggregatorFiles, store: AggregatorStore, path: Path, now_s: float, *, as_json: bool
) -> dict[str, Any]:
    """Upgrade, and say what was done; for scripts as it is returned."""
    helpers = {name: one.key for name, one in pinned(files.config.helpers).items()}
    keys = LogKeys(origin_of(files.config.aggregator.tenant), files.signing_key().public_key(), helpers)
    with progress_bar() as tell:
        done = upgrading.upgrade(
            store.database, store.blobs, path, keys=keys, actor=local_actor(), now_s=now_s, progress=tell
        )
    saved, log = done.backup, done.log
    if not as_json:
        typer.echo(
            f"{path}: {saved.rows} rows and {saved.blobs} models and other large values as they were, "
            f"{saved.num_bytes} bytes"
        )
        held = "holds" if log.fault is None else f"did not hold before ({log.fault.outcome}: {log.fault.detail})"
        typer.echo(f"all {done.rows} rows are there, and the audit log of {log.entries} entries {held}")
        typer.echo(f"the database is of revision {newest_revision()} now; start the service again")
    return {
        "backup": str(path),
        "backup_bytes": saved.num_bytes,
        "rows": done.rows,
        "audit_entries": log.entries,
        "audit_fault": None if log.fault is None else log.fault.outcome,
    }


def _say_planned(planned: upgrading.Planned) -> None:
    """From where to where."""
    typer.echo(f"the database is {of_revision(planned.revision)}, this software needs {newest_revision()}:")
    for step in planned.steps:
        typer.echo(f"  {step.revision}  {step.what}")


def _default_name(folder: Path, revision: str | None, now_s: float) -> Path:
    """A new name for the backup."""
    at = datetime.fromtimestamp(now_s, timezone.utc)
    return folder / f"covey-{at:%Y-%m-%dT%H%M%SZ}-revision-{revision or '0000'}.backup"
