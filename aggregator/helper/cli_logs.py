"""``covey-helper log``: which checkpoints of studies' audit logs this helper has co-signed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aggregator.cli_options import write_files
from aggregator.command_line import make_group, moment, say_json, say_table
from aggregator.errors import AggregatorError
from aggregator.helper.cli_options import AsJson, Config, examples, opened

Tenant = Annotated[str, typer.Option(help="The study.")]

log_app = make_group("Studies' audit logs, as far as this helper has co-signed them.")


@log_app.command("list", epilog=examples("log list --config helper.toml", "log list --config helper.toml --json"))
def log_list(config: Config, as_json: AsJson = False) -> None:
    """List the newest checkpoint that was co-signed of each log, and of logs that were given up."""
    with opened(config) as (_, store):
        found = store.logs.all()
    if as_json:
        say_json([{**one._asdict(), "root": one.root.hex()} for one in found])
        return
    rows = [
        (one.tenant, one.size, one.root.hex()[:16], moment(one.cosigned_s), moment(one.given_up_s)) for one in found
    ]
    say_table("Audit logs", ("study", "entries", "root", "co-signed", "given up"), rows)


@log_app.command(
    "checkpoint",
    epilog=examples(
        "log checkpoint --config helper.toml --tenant clinic --out kept.note",
    ),
)
def log_checkpoint(
    config: Config, tenant: Tenant, out: Annotated[Path | None, typer.Option(help="File to write.")] = None
) -> None:
    """Show the newest checkpoint that was co-signed; `covey-aggregator audit verify --checkpoint` takes it."""
    with opened(config) as (files, store):
        files.check_tenant(tenant)
        notes = [one.note for one in store.logs.all() if (one.tenant, one.given_up_s) == (tenant, None)]
    if not notes:
        raise AggregatorError(f"no checkpoint of the audit log of {tenant} was co-signed yet")
    if out is None:
        typer.echo(notes[0], nl=False)
        return
    write_files(out.parent, {out.name: notes[0].encode()})
    typer.echo(str(out))


@log_app.command("begin-anew", epilog=examples("log begin-anew --config helper.toml --tenant clinic"))
def log_begin_anew(config: Config, tenant: Tenant) -> None:
    """Co-sign a study's log from its beginning again, whatever it holds: what was co-signed before is given up.

    Only after the study has told why its log is another one: its database was lost and a backup restored, say. Then
    ask for the entry `database.restored`, and keep the checkpoint that you give up (`log checkpoint`).
    """
    with opened(config) as (files, store):
        if not store.logs.give_up(files.check_tenant(tenant), now_s=time.time()):
            raise AggregatorError(f"no checkpoint of the audit log of {tenant} was co-signed yet: nothing is given up")
    typer.echo(f"the next checkpoint of {tenant} is co-signed without a proof that it continues the last one")
