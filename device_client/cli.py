"""The command ``covey-device`` (argparse, to keep the device's dependencies few)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from device_client.assembly import DeviceFiles, assemble
from device_client.device_store import check_records, create_identity, save_records
from device_client.errors import LedgerError, StoreError
from device_client.training import Records
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.adapters.software import software_version
from fl_protocol.errors import BundleError, ConfigError, CoveyError
from fl_protocol.model_manifest import label_array
from fl_protocol.signing import public_key_hex

_EXIT_CODES: list[tuple[type[CoveyError], int]] = [
    (ConfigError, 2),
    (StoreError, 3),
    (LedgerError, 3),
    (BundleError, 4),
    (CoveyError, 1),
]
_EPILOG = """examples:
  covey-device init   --config device.toml             make keys, print the public one to register
  covey-device import --config device.toml windows.npz  store labelled windows (arrays x [n,samples,channels], y [n])
  covey-device run    --config device.toml             take part until stopped; one JSON line per event
  covey-device ledger --config device.toml             what was spent of the privacy budget, and on what

exit codes: 0 done, 1 other error, 2 usage or configuration, 3 store or ledger, 4 model bundle
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; every error of ours is one sentence on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(DeviceFiles.load(arguments.config), arguments))
    except CoveyError as error:
        print(f"covey-device: {error}", file=sys.stderr)
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="covey-device",
        description="Train on this device's own recordings; send only sealed, noised, charged-for updates.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"covey-device {software_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("init", _init, "make the store and this device's keys; print its public key"),
        ("import", _import, "replace the stored records by those in an .npz file"),
        ("run", _run, "take part in the study until stopped"),
        ("ledger", _ledger, "show the privacy ledger"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--config", type=Path, required=True, help="path of device.toml")
        sub.set_defaults(command=command)
        if name == "import":
            sub.add_argument(
                "windows", type=Path, help=".npz with x float32 [n, ...] and y, int32 [n] or float32 [n, K]"
            )
    return parser


def _init(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Make keys where there are none."""
    with closing(files.open_store(create=True)) as store:
        key = create_identity(store, os.urandom)
    print(public_key_hex(key.public_key()))
    return 0


def _import(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Check windows against the model's schema, then store them."""
    manifest = files.open_bundle().manifest
    try:
        loaded = np.load(arguments.windows, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ConfigError(f"{arguments.windows}: expected an .npz with arrays x and y, got a single array")
        with loaded as archive:
            x = archive["x"].astype(np.float32)
            records = Records(x, label_array(archive.get("y"), len(x), label=manifest.label))
    # numpy: EOFError for an empty file, BadZipFile for a damaged one.
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ConfigError(f"{arguments.windows}: expected an .npz with arrays x and y ({error})") from error
    check_records(records, window_shape=manifest.input.shape, label=manifest.label)
    with closing(files.open_store(create=True)) as store:
        save_records(store, records)
    print(f"{len(records)} windows stored, encrypted, in {files.config.device.store}")
    return 0


def _run(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Run the daemon until SIGINT or SIGTERM."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    assemble(files, software=f"covey {software_version()}", journal=JsonLines()).run(lambda: bool(stop))
    return 0


def _ledger(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Print the ledger."""
    with closing(files.open_store()) as store:
        ledger = files.open_ledger(store)
    budget = ledger.budget
    print(f"spent: epsilon {ledger.spent_epsilon:.4f} of {budget.epsilon:g} at delta {budget.delta:g}")
    print(f"participations: {len(ledger.reservations)}")
    if ledger.reservations:
        print(f"enforced at Rényi order {ledger.order:g}")
        left = ledger.remaining_participations(ledger.reservations[-1].rdp())
        print(f"left: {left:g} more like the last")
    for entry in ledger.reservations:
        print(
            f"  {entry.task} round {entry.round}: {entry.steps} step(s), "
            f"sampling rate {entry.sampling_rate:g}, noise multiplier {entry.noise_multiplier:g}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
