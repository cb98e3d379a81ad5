"""``covey-aggregator broker``: files for mosquitto."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aggregator.assembly import AggregatorFiles
from aggregator.broker_config import claims_acl, claims_config, mosquitto_acl, mosquitto_config
from aggregator.ca_folder import load_ca
from aggregator.certificates import make_crl
from aggregator.cli_options import Config, Out, opened, write_files
from aggregator.command_line import examples, make_group
from aggregator.enrolment.revocation import revoked_certificates

broker_app = make_group("Files for mosquitto: TLS 1.3, client certificates, an ACL, who was revoked.")


@broker_app.command(
    "config",
    epilog=examples(
        "ca server --ca ca --host broker.example --out broker",
        "broker config --config aggregator.toml --worker worker-1 --worker worker-2 --out broker",
        "broker config --config aggregator.toml --ca ca --out broker",
    ),
)
def broker_config(
    config: Config,
    out: Out,
    name: Annotated[list[str], typer.Option("--worker", help="Name of an ingest worker; repeatable.")] = [],  # noqa: B006
    listen: Annotated[str, typer.Option(help="Address that mosquitto listens on.")] = "0.0.0.0",  # noqa: S104
    user: Annotated[str, typer.Option(help="Account that mosquitto runs under.")] = "mosquitto",
    ca: Annotated[
        Path | None, typer.Option(help="Folder of the CA; with it the broker refuses certificates that were revoked.")
    ] = None,
) -> None:
    """Write mosquitto.conf and its ACL beside the broker's certificate; written anew when a worker is added.

    With a section [enrolment], also claims.conf and its ACL, for the broker where devices ask to join: a second
    mosquitto beside the first.
    """
    section = AggregatorFiles.load(config).config
    desk, folder, tenant = section.enrolment, str(out.absolute()), section.aggregator.tenant
    written = {
        "mosquitto.conf": mosquitto_config(
            host=listen, port=section.broker.port, folder=folder, user=user, revocation=ca is not None
        ),
        "acl": mosquitto_acl(
            tenant=tenant,
            aggregator=section.aggregator.client_id,
            workers=tuple(name),
            desk=None if desk is None else desk.client_id,
        ),
    }
    if desk is not None:
        written["claims.conf"] = claims_config(host=listen, port=desk.broker.port, folder=folder, user=user)
        written["claims.acl"] = claims_acl(tenant=tenant, desk=desk.client_id)
    files = {file: text.encode() for file, text in written.items()}
    if ca is not None:
        files["crl.pem"] = _present_list(config, ca)
    write_files(out, files)
    for file in files:
        typer.echo(str(out / file))


def _present_list(config: Path, ca: Path) -> bytes:
    """Who is revoked now."""
    now_s = time.time()
    with opened(config) as (_, store), store.database.reading() as connection:
        revoked = [(int(one.serial, 16), one.revoked_s) for one in revoked_certificates(connection, now_s=now_s)]
    return make_crl(load_ca(ca), revoked, now_s=now_s)
