"""``covey-aggregator broker``: files for mosquitto."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from aggregator.assembly import AggregatorFiles
from aggregator.broker_check import Yard, check_broker
from aggregator.broker_config import claims_acl, claims_config, mosquitto_acl, mosquitto_config
from aggregator.ca_folder import load_ca
from aggregator.certificates import make_crl
from aggregator.cli_options import AsJson, Ca, Config, Out, opened, write_files
from aggregator.command_line import examples, make_group, say_json, say_table
from aggregator.enrolment.revocation import revoked_certificates
from aggregator.errors import AggregatorError
from fl_protocol.adapters.mqtt import TlsFiles

broker_app = make_group("Files for mosquitto: TLS 1.3, client certificates, an ACL, who was revoked.")


@broker_app.command(
    "config",
    epilog=examples(
        "ca server --ca ca --host broker.example --out broker",
        "broker config --config aggregator.toml --worker worker-1 --worker worker-2 --out broker",
        "broker config --config aggregator.toml --standby aggregator-2 --out broker",
        "broker config --config aggregator.toml --ca ca --out broker",
    ),
)
def broker_config(
    config: Config,
    out: Out,
    name: Annotated[list[str], typer.Option("--worker", help="Name of an ingest worker; repeatable.")] = [],  # noqa: B006
    standby: Annotated[
        list[str], typer.Option("--standby", help="client_id of another `run` that stands by; repeatable.")
    ] = [],  # noqa: B006
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
            standbys=tuple(standby),
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


@broker_app.command(
    "check",
    epilog=examples(
        "broker check --config aggregator.toml --ca ca",
        "broker check --config aggregator.toml --ca ca --broker broker --json",
    ),
)
def broker_check(
    config: Config,
    ca: Ca,
    broker: Annotated[Path | None, typer.Option(help="Folder of the broker's own certificate and key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Try what a running broker must forbid, as two made-up devices; exit code 1 if anything of it works.

    No other client is disturbed. It takes some seconds.
    """
    files = AggregatorFiles.load(config)
    section = files.config
    server = None
    if broker is not None:
        server = TlsFiles(broker / "ca.pem", broker / "broker.pem", broker / "broker.key")
    yard = Yard(
        host=section.broker.host,
        port=section.broker.port,
        ca=load_ca(ca),
        tenant=section.aggregator.tenant,
        task="check",
        entropy=os.urandom,
        now_s=time.time(),
        folder=Path(),
        server=server,
    )
    found = check_broker(yard)
    if as_json:
        say_json([one._asdict() for one in found])
    else:
        words = {True: "holds", False: "DOES NOT HOLD", None: "not tried"}
        say_table(
            f"{section.broker.host}:{section.broker.port}",
            ("check", "", "what came of it"),
            [(one.check, words[one.holds], one.detail) for one in found],
        )
    failed = sum(one.holds is False for one in found)
    if failed:
        raise AggregatorError(
            f"{failed} of {len(found)} checks do not hold: write the files anew with covey-aggregator broker config, "
            "and have the broker read them"
        )
    if found[0].holds is None:
        raise AggregatorError(f"nothing could be tried: {found[0].detail}")


def _present_list(config: Path, ca: Path) -> bytes:
    """Who is revoked now."""
    now_s = time.time()
    with opened(config) as (_, store), store.database.reading() as connection:
        revoked = [(int(one.serial, 16), one.revoked_s) for one in revoked_certificates(connection, now_s=now_s)]
    return make_crl(load_ca(ca), revoked, now_s=now_s)
