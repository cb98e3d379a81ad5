"""The command ``covey-aggregator`` (typer and rich)."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aggregator.assembly import AggregatorFiles, assemble
from aggregator.command_line import make_app, run_app
from aggregator.errors import DatabaseError
from aggregator.export import export_model
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import JsonLines
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

  covey-aggregator run --config aggregator.toml             serve until stopped; one JSON line per event

  covey-aggregator status --config aggregator.toml          where the task stands

  covey-aggregator export --config aggregator.toml --out .  the trained model as files

Exit codes: 0 done, 1 other error, 2 usage or configuration, 3 database, 4 model bundle.
"""

app = make_app("covey-aggregator", _HELP)
device_app = typer.Typer(help="Devices that may send updates.", no_args_is_help=True)
app.add_typer(device_app, name="device")
Config = Annotated[Path, typer.Option(help="Path of aggregator.toml.")]


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
    table.add_row("registered devices", str(len(store.devices())))
    for reason, count in sorted(store.refusals().items()):
        table.add_row(f"refused: {re.sub('_', ' ', reason)}", str(count))
    Console().print(table)


@app.command()
def export(config: Config, out: Annotated[Path, typer.Option(help="Folder for the files.")]) -> None:
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
    """List the registered devices."""
    for device, key in AggregatorFiles.load(config).open_store().devices():
        typer.echo(f"{device}  {key.hex()}")


if __name__ == "__main__":
    main()
