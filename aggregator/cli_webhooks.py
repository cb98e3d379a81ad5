"""``covey-aggregator webhook``: secrets, what each receiver has been told, and a message to try it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from aggregator.alerts.assembly import webhooks_of
from aggregator.alerts.events import WebhookBody
from aggregator.alerts.signature import headers_of, new_secret
from aggregator.alerts.webhooks import standings
from aggregator.assembly import AggregatorFiles
from aggregator.cli_options import AsJson, Config, opened
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from aggregator.errors import AggregatorError
from fl_protocol.adapters.files import write_atomic
from fl_protocol.errors import ConfigError

webhook_app = make_group("Webhooks: where an operator is told what happens.")


@webhook_app.command("secret", epilog=examples("webhook secret --out keys/pager.secret"))
def secret(out: Annotated[Path, typer.Option(help="File to write; must not exist.")]) -> None:
    """Make a secret; the receiver needs the same, over a way that you trust."""
    if out.exists():
        raise ConfigError(f"--out {out}: there is a file already; a receiver may know that secret")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, new_secret(os.urandom).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from error
    typer.echo(f"{out}: keep it secret; give the receiver the same")


@webhook_app.command(
    "list", epilog=examples("webhook list --config aggregator.toml", "webhook list --config aggregator.toml --json")
)
def list_webhooks(config: Config, as_json: AsJson = False) -> None:
    """Show what each webhook has been told, and why one is behind."""
    with opened(config) as (_, store), store.database.reading() as connection:
        found = standings(connection)
    if as_json:
        say_json(found)
        return
    now_s = time.time()
    rows = [
        (
            one.name,
            one.delivered,
            moment(one.delivered_s),
            one.waiting,
            one.failures,
            f"in {max(0.0, one.due_s - now_s):.0f} s" if one.failures else "",
            one.problem,
        )
        for one in found
    ]
    say_table("Webhooks", ("name", "taken", "last", "entries behind", "failures", "again", "problem"), rows)


@webhook_app.command("test", epilog=examples("webhook test pager --config aggregator.toml"))
def test(name: Annotated[str, typer.Argument(help="Of the webhook.", show_default=False)], config: Config) -> None:
    """Post a message with the event `test` now, signed as any other; whether it is taken."""
    files = AggregatorFiles.load(config)
    hook = next((one for one in webhooks_of(files) if one.name == name), None)
    if hook is None:
        names = ", ".join(one.name for one in files.config.webhook) or "none"
        raise ConfigError(f"expected a webhook of {config} ({names}), got {name}")
    now_s, tenant = time.time(), files.config.aggregator.tenant
    told = WebhookBody(
        id=f"{tenant}-test-{int(now_s)}", event="test", at_s=now_s, tenant=tenant, subject="", detail={}, entry=-1
    )
    body = msgspec.json.encode(told)
    problem = hook.post(body, headers_of(told.id, body, key=hook.key, now_s=now_s))
    if problem:
        raise AggregatorError(f"webhook {name} did not take the message: {problem}")
    typer.echo(f"{name} took the message {told.id}")
