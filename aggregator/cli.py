"""The command ``covey-aggregator`` (typer and rich)."""

from __future__ import annotations

import re
import signal
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aggregator.admission import Admitter
from aggregator.assembly import AggregatorFiles, assemble
from aggregator.ca_folder import create_ca, issue_client, issue_server, load_ca, write_new
from aggregator.command_line import make_app, run_app
from aggregator.errors import DatabaseError
from aggregator.export import export_model
from fl_protocol.adapters.config_files import read_file
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import BundleError, ConfigError, CoveyError
from fl_protocol.signing import public_key_from_hex, public_key_hex
from fl_protocol.topics import checked_name

_EXIT_CODES: list[tuple[type[CoveyError], int]] = [
    (ConfigError, 2),
    (DatabaseError, 3),
    (BundleError, 4),
    (CoveyError, 1),
]
_HELP = """Open rounds, add up sealed updates, sign and publish the next model.

Examples:

  covey-aggregator init --config aggregator.toml            make the signing key, print its public half

  covey-aggregator device add --config aggregator.toml watch-7 PUBLIC_KEY_HEX

  covey-aggregator ca init --ca ca                          make the CA that certifies broker and devices

  covey-aggregator ca server --ca ca --host broker.example --out mosquitto

  covey-aggregator ca client --ca ca --name aggregator --out keys

  covey-aggregator device admit request.json --config aggregator.toml --ca ca --out answer.json

  covey-aggregator run --config aggregator.toml             serve until stopped; one JSON line per event

  covey-aggregator status --config aggregator.toml          where the task stands

  covey-aggregator export --config aggregator.toml --out .  the trained model as files

Exit codes: 0 done, 1 other error, 2 usage or configuration, 3 database, 4 model bundle.
"""

app = make_app("covey-aggregator", _HELP)
device_app = typer.Typer(help="Devices that may send updates.", no_args_is_help=True)
app.add_typer(device_app, name="device")
ca_app = typer.Typer(help="The CA that certifies the broker, the aggregator and devices.", no_args_is_help=True)
app.add_typer(ca_app, name="ca")
Config = Annotated[Path, typer.Option(help="Path of aggregator.toml.")]
Ca = Annotated[Path, typer.Option(help="Folder of the CA's certificate and key.")]
Out = Annotated[Path, typer.Option(help="Folder for the files.")]


def main() -> None:
    """Entry point."""
    run_app(app, "covey-aggregator", _EXIT_CODES)


@app.command()
def init(config: Config) -> None:
    """Make the signing key and the database where there are none; print the public key that devices pin."""
    files = AggregatorFiles.load(config)
    key = files.signing_key(create=True)
    bundle, store = files.open_bundle(), files.open_store()
    store.create_task(bundle.graph_digest, bundle.shared_params)
    typer.echo(public_key_hex(key.public_key()))


@app.command()
def run(config: Config) -> None:
    """Serve until stopped; one JSON line per event on standard output."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    assemble(AggregatorFiles.load(config), journal=JsonLines()).run(lambda: bool(stop))


@app.command()
def status(config: Config) -> None:
    """Show where the task stands, and what was refused."""
    files = AggregatorFiles.load(config)
    store, task = files.open_store(), files.config.task
    state = store.round_state()
    table = Table(title=f"{files.config.aggregator.tenant}/{task.name}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("phase", state.phase.value)
    table.add_row("round", str(state.number))
    table.add_row("committed rounds", f"{state.committed} of {task.rounds}")
    table.add_row("updates in the open round", f"{state.arrived} of {task.goal}")
    table.add_row("registered ids", str(len(store.devices())))
    for reason, count in sorted(store.refusals().items()):
        table.add_row(f"refused: {re.sub('_', ' ', reason)}", str(count))
    Console().print(table)


@app.command()
def export(config: Config, out: Out) -> None:
    """Write the current model as a signed bundle and as an inference-only .tflite."""
    files = AggregatorFiles.load(config)
    store = files.open_store()
    model = store.model(store.round_state().model_version)
    exported = export_model(files.open_bundle(), model, signing_key=files.signing_key())
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in (("model.covey", exported.bundle), ("model.tflite", exported.inference)):
            write_atomic(out / name, data, mode=0o644)
            typer.echo(str(out / name))
    except OSError as error:
        raise ConfigError(f"--out {out}: the files cannot be written ({error.strerror})") from error


@device_app.command("add")
def device_add(config: Config, device: str, public_key: str) -> None:
    """Register a device by its id and the public key that `covey-device init` printed."""
    checked_name(device, "device")
    key = public_key_from_hex(public_key)
    AggregatorFiles.load(config).open_store().add_device(device, key.public_bytes_raw(), time.time())
    typer.echo(f"{device} may send updates")


@device_app.command("list")
def device_list(config: Config) -> None:
    """List the registered ids and their keys; a device with pseudonyms has several."""
    for device, key in AggregatorFiles.load(config).open_store().devices():
        typer.echo(f"{device}  {key.hex()}")


@device_app.command("admit")
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
    files = AggregatorFiles.load(config)
    data = read_file(request, "REQUEST")
    if out.exists():
        raise ConfigError(f"--out: {out} exists and is not replaced; name another file")
    signing_key, authority, written = files.signing_key(), load_ca(ca), []

    def deliver(answer: bytes) -> None:
        write_new(out.parent, {out.name: answer}, option="--out")
        written.append(out)

    admitter = Admitter(
        store=files.open_store(),
        tenant=files.config.aggregator.tenant,
        task=files.config.task.name,
        ca=authority,
        signing_key=signing_key,
        period_days=period_days,
    )
    try:
        begins_s = time.time() + (period_days * DAY_S if next_period else 0)
        done = admitter.admit(data, now_s=begins_s, deliver=deliver)
    except CoveyError:
        for path in written:  # and then the database did not take it
            path.unlink(missing_ok=True)
        raise
    first, last = (datetime.fromtimestamp(at_s, timezone.utc) for at_s in (done.period.begins_s, done.period.ends_s))
    typer.echo(f"{len(done.ids)} pseudonyms may send updates, one after the other, {first:%Y-%m-%d} to {last:%Y-%m-%d}")
    typer.echo(f"give {out} to the device, then delete it and {request}: they tell which pseudonyms are one device's")


@ca_app.command("init")
def ca_init(
    ca: Ca, name: Annotated[str, typer.Option(help="Its name; the broker and every device see it.")] = "covey"
) -> None:
    """Make a CA: a certificate, and a key that must never leave the operator. Nothing is overwritten."""
    create_ca(ca, name=name, now_s=time.time())
    typer.echo(f"{ca}: ca.pem for everybody, ca.key for nobody else; keep a copy of both where no network reaches")


@ca_app.command("server")
def ca_server(
    ca: Ca, host: Annotated[list[str], typer.Option(help="DNS name or IP address of the broker; repeatable.")], out: Out
) -> None:
    """Make the broker's certificate and key, valid for a year."""
    issue_server(load_ca(ca), out, hosts=tuple(host), now_s=time.time())
    typer.echo(f"{out}: broker.pem, broker.key and ca.pem, for mosquitto's certfile, keyfile and cafile")


@ca_app.command("client")
def ca_client(
    ca: Ca, name: Annotated[str, typer.Option(help="The client's name: the aggregator's client_id.")], out: Out
) -> None:
    """Make the aggregator's certificate and key, valid for a year; devices make their keys themselves."""
    issue_client(load_ca(ca), out, name=checked_name(name, "--name"), now_s=time.time())
    typer.echo(f"{out}: {name}.pem, {name}.key and ca.pem, for the broker section of aggregator.toml")


if __name__ == "__main__":
    main()
