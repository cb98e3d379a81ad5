"""``covey-aggregator device``: who may send updates."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from aggregator.admission import Admitter
from aggregator.audit.log import local_actor
from aggregator.ca_folder import load_ca, write_new
from aggregator.cli_options import AsJson, Ca, Config, opened
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from aggregator.device_list import read_devices
from aggregator.enrolment.register import State, names_of
from aggregator.enrolment.revocation import change_state, enrolment_of
from aggregator.errors import AggregatorError
from fl_protocol.adapters.config_files import read_file
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError, CoveyError
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import checked_name

device_app = make_group("Devices that may send updates.")


@device_app.command("add", epilog=examples("device add --config aggregator.toml watch-7 PUBLIC_KEY_HEX"))
def device_add(config: Config, device: str, public_key: str) -> None:
    """Register a device by its id and the public key that `covey-device init` printed."""
    checked_name(device, "device")
    key = public_key_from_hex(public_key)
    with opened(config) as (_, store):
        store.devices.add(device, key.public_bytes_raw(), time.time(), actor=local_actor())
    typer.echo(f"{device} may send updates")


@device_app.command("import", epilog=examples("device import devices.csv --config aggregator.toml"))
def device_import(
    devices: Annotated[Path, typer.Argument(help="CSV file: id and public key (64 hex digits) on each line.")],
    config: Config,
) -> None:
    """Register all devices of a file, or none; a key that a device has already is replaced."""
    listed = read_devices(read_file(devices, "DEVICES"), str(devices))
    with opened(config) as (_, store):
        store.devices.add_all(listed, time.time(), actor=local_actor())
    typer.echo(f"{len(listed)} devices may send updates")


@device_app.command("remove", epilog=examples("device remove --config aggregator.toml watch-7"))
def device_remove(config: Config, device: str) -> None:
    """Take no more updates under an id; what was accepted stays. A device with pseudonyms has several ids."""
    with opened(config) as (_, store):
        if not store.devices.remove(checked_name(device, "device"), time.time(), actor=local_actor()):
            raise AggregatorError(f"{device} is not registered; see covey-aggregator device list")
    typer.echo(f"{device} may send no more updates")


@device_app.command(
    "list", epilog=examples("device list --config aggregator.toml", "device list --config aggregator.toml --json")
)
def device_list(config: Config, as_json: AsJson = False) -> None:
    """List the registered ids and their keys; a device with pseudonyms has several."""
    with opened(config) as (_, store):
        registered = store.devices.all()
    if as_json:
        say_json([{"device": device, "public_key": key.hex()} for device, key in registered])
        return
    for device, key in registered:
        typer.echo(f"{device}  {key.hex()}")


@device_app.command(
    "admit",
    epilog=examples(
        "device admit request.json --config aggregator.toml --ca ca --out answer.json",
        "device admit request.json --config aggregator.toml --ca ca --out answer.json --next-period",
    ),
)
def device_admit(
    request: Annotated[Path, typer.Argument(help="File made by `covey-device pseudonyms request`.")],
    config: Config,
    ca: Ca,
    out: Annotated[Path, typer.Option(help="File to write the answer to, for the device.")],
    period_days: Annotated[int, typer.Option(min=2, max=366, help="How long each pseudonym is used.")] = 30,
    next_period: Annotated[
        bool, typer.Option("--next-period", help="The first is for the next period: the device still has one for this.")
    ] = False,
) -> None:
    """Check a device's request for pseudonyms, register and certify all of them, or none."""
    data = read_file(request, "REQUEST")
    if out.exists():
        raise ConfigError(f"--out: {out} exists and is not replaced; name another file")
    written = []

    def deliver(answer: bytes) -> None:
        write_new(out.parent, {out.name: answer}, option="--out")
        written.append(out)

    with opened(config) as (files, store):
        admitter = Admitter(
            store=store,
            tenant=files.config.aggregator.tenant,
            ca=load_ca(ca),
            signing_key=files.signing_key(),
            period_days=period_days,
            actor=local_actor(),
        )
        try:
            begins_s = time.time() + (period_days * DAY_S if next_period else 0)
            done = admitter.admit(data, now_s=begins_s, deliver=deliver, told_s=time.time())
        except CoveyError:
            for path in written:  # and then the database did not take it
                path.unlink(missing_ok=True)
            raise
    first, last = (datetime.fromtimestamp(at_s, timezone.utc) for at_s in (done.period.begins_s, done.period.ends_s))
    typer.echo(f"{len(done.ids)} pseudonyms may send updates, one after the other, {first:%Y-%m-%d} to {last:%Y-%m-%d}")
    typer.echo(f"give {out} to the device, then delete it and {request}: they tell which pseudonyms are one device's")


Reason = Annotated[str, typer.Option(help="Why; it is in the log, and the device is told.")]
Which = Annotated[str, typer.Argument(help="An enrolment, or any of its names.", show_default=False)]


@device_app.command("show", epilog=examples("device show e0123... --config aggregator.toml"))
def device_show(device: Which, config: Config, as_json: AsJson = False) -> None:
    """Show one enrolled device: whose it is, its state, its names and until when they last."""
    with opened(config) as (_, store), store.database.reading() as connection:
        found = enrolment_of(connection, device, lock=False)
        names = names_of(connection, found.enrolment)
    about = {name: getattr(found, name) for name in ("enrolment", "task", "owner", "state", "reason")}
    if as_json:
        times = {name: getattr(found, name) for name in ("enrolled_s", "changed_s", "lasts_until_s")}
        say_json({**about, **times, "names": [one._asdict() for one in names]})
        return
    times = {"enrolled": found.enrolled_s, "changed": found.changed_s, "names until": found.lasts_until_s}
    rows = [*about.items(), *((what, moment(at_s)) for what, at_s in times.items())]
    say_table(f"Device {found.enrolment}", ("what", "value"), rows)
    columns = ("name", "certificate", "from", "until")
    shown = [(one.device, one.serial, moment(one.not_before_s), moment(one.not_after_s)) for one in names]
    say_table("Its names", columns, shown)


@device_app.command(
    "revoke", epilog=examples("device revoke e0123... --reason 'lost on a train' --config aggregator.toml")
)
def device_revoke(
    device: Which,
    config: Config,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Throw a device out, for good: its updates are refused, its certificates too, and its connection is ended."""
    if not yes and not typer.confirm(f"Throw {device} out for good?"):
        raise typer.Abort
    _put(config, device, "revoked", reason)


@device_app.command(
    "quarantine", epilog=examples("device quarantine e0123... --reason 'odd updates' --config aggregator.toml")
)
def device_quarantine(device: Which, config: Config, reason: Reason) -> None:
    """Put a device aside: its updates are refused until it is restored, and it keeps them."""
    _put(config, device, "quarantined", reason)


@device_app.command("restore", epilog=examples("device restore e0123... --config aggregator.toml"))
def device_restore(device: Which, config: Config, reason: Reason = "") -> None:
    """Take a quarantined device back."""
    _put(config, device, "active", reason)


def _put(config: Path, device: str, state: State, reason: str) -> None:
    """Put an enrolment into another state, and say so."""
    with opened(config) as (_, store), store.database.transaction() as connection:
        before = change_state(connection, device, state, reason=reason, actor=local_actor(), now_s=time.time())
    typer.echo(f"{before.enrolment} of {before.owner} was {before.state} and is {state}")
