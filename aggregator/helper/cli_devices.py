"""``covey-helper device``: whose contributions are believed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator.command_line import make_group, moment, say_json, say_table
from aggregator.device_list import read_devices
from aggregator.errors import AggregatorError
from aggregator.helper.cli_options import AsJson, Config, examples, opened
from fl_protocol.adapters.config_files import read_file
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import checked_name

Tenant = Annotated[str, typer.Option(help="The study that the devices are of.")]

device_app = make_group("Devices whose contributions this helper believes.")


@device_app.command("import", epilog=examples("device import devices.csv --config helper.toml --tenant clinic"))
def device_import(
    devices: Annotated[Path, typer.Argument(help="CSV file: id and public key (64 hex digits) on each line.")],
    config: Config,
    tenant: Tenant,
) -> None:
    """Register all devices of a file, or none; a key that a device has already is replaced."""
    listed = read_devices(read_file(devices, "DEVICES"), str(devices))
    with opened(config) as (files, store):
        store.devices.add_all(files.check_tenant(tenant), listed)
    typer.echo(f"{len(listed)} devices of {tenant} are known")


@device_app.command("add", epilog=examples("device add watch-7 PUBLIC_KEY_HEX --config helper.toml --tenant clinic"))
def device_add(device: str, public_key: str, config: Config, tenant: Tenant) -> None:
    """Register a device by its id and public key."""
    checked_name(device, "device")
    key = public_key_from_hex(public_key).public_bytes_raw()
    with opened(config) as (files, store):
        store.devices.add_all(files.check_tenant(tenant), [(device, key)])
    typer.echo(f"{device} of {tenant} is known")


@device_app.command("remove", epilog=examples("device remove watch-7 --config helper.toml --tenant clinic"))
def device_remove(device: str, config: Config, tenant: Tenant) -> None:
    """Believe a device no more; lists with it are refused."""
    with opened(config) as (files, store):
        if not store.devices.remove(files.check_tenant(tenant), checked_name(device, "device")):
            raise AggregatorError(f"{device} of {tenant} is not known; see covey-helper device list")
    typer.echo(f"{device} of {tenant} is not known any more")


@device_app.command(
    "list", epilog=examples("device list --config helper.toml", "device list --config helper.toml --json")
)
def device_list(config: Config, as_json: AsJson = False) -> None:
    """List the devices that are known, and their keys."""
    with opened(config) as (_, store):
        known = store.devices.all()
    if as_json:
        say_json([{"tenant": tenant, "device": device, "public_key": key.hex()} for tenant, device, key in known])
        return
    for tenant, device, key in known:
        typer.echo(f"{tenant}  {device}  {key.hex()}")


@device_app.command(
    "revoked", epilog=examples("device revoked --config helper.toml", "device revoked --config helper.toml --json")
)
def device_revoked(config: Config, as_json: AsJson = False) -> None:
    """List the devices that studies have told were thrown out; lists with one of them are refused, for ever."""
    with opened(config) as (_, store):
        found = store.revoked.all()
    if as_json:
        say_json([one._asdict() for one in found])
        return
    say_table(
        "Thrown out", ("study", "device", "told"), [(one.tenant, one.device, moment(one.told_s)) for one in found]
    )
