"""The command ``covey-device`` (argparse, to keep the device's dependencies few): its arguments, and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from device_client import cli_ask, cli_enroll, cli_store
from device_client.assembly import DeviceFiles
from device_client.doctor import run_doctor
from device_client.errors import LedgerError, StoreError
from fl_protocol.adapters.software import software_version
from fl_protocol.errors import BundleError, ConfigError, CoveyError
from fl_protocol.terminal import visible

_EXIT_CODES: list[tuple[type[CoveyError], int]] = [
    (ConfigError, 2),
    (StoreError, 3),
    (LedgerError, 3),
    (BundleError, 4),
    (CoveyError, 1),
]
_EPILOG = """examples:
  covey-device init    --config device.toml               make the store's key and this device's keys
  covey-device enroll  --config device.toml --claim claim.json --token T --bundle watch.covey     join a study
  covey-device import  --config device.toml walk.csv      store labelled recordings, encrypted (.csv or .npz)
  covey-device pseudonyms --config device.toml request --out request.json     ask the operator for names on the wire
  covey-device pseudonyms --config device.toml install answer.json            and take them
  covey-device consent --config device.toml list          what each study would do
  covey-device consent --config device.toml grant steps   agree to it
  covey-device run     --config device.toml               take part until stopped; one JSON line per event
  covey-device status  --config device.toml               what it is doing, and why it is not training
  covey-device ledger  --config device.toml               what was spent of the privacy budget, and on what
  covey-device sent    --config device.toml               every update that left this device
  covey-device erase   --config device.toml --data        destroy the recordings
  covey-device doctor  --config device.toml               what is missing for it to work

status, consent, ledger, sent and erase --data ask the running daemon, or open the store when none runs.

exit codes: 0 done, 1 other error, 2 usage or configuration, 3 store or ledger, 4 model bundle, 5 doctor found problems
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; every error of ours is one sentence on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        code = int(arguments.command(DeviceFiles.load(arguments.config), arguments))
        sys.stdout.flush()
    except CoveyError as error:
        print(visible(f"covey-device: {error}"), file=sys.stderr)
        return exit_code_of(error)
    except BrokenPipeError:  # whoever read the output went away
        _drop_output()
        return 1
    except OSError as error:  # a place that was not foreseen: a full or read-only disk, a folder of somebody else
        print(visible(f"covey-device: {error.filename or 'output'}: {error.strerror or error}"), file=sys.stderr)
        _drop_output()
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def exit_code_of(error: CoveyError) -> int:
    """What a process ends with after an error."""
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def _drop_output() -> None:
    """What could not be written would fail once more at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        ("init", cli_store.init, "make the store and this device's keys; print the public key of each fixed name"),
        ("enroll", cli_enroll.enroll, "join a study with a token, and write it into device.toml"),
        ("import", cli_store.import_records, "store labelled recordings from a .csv or .npz file"),
        ("pseudonyms", cli_store.pseudonyms, "ask for names on the wire, install the answer, or list them"),
        ("run", cli_store.run, "take part in the granted studies until stopped"),
        ("status", cli_ask.status, "what the device is doing, and why it is not training"),
        ("consent", cli_ask.consent, "list the studies, agree to one, or leave it"),
        ("ledger", cli_ask.ledger, "show the privacy ledger"),
        ("sent", cli_ask.sent, "show every update that left this device"),
        ("erase", cli_store.erase, "destroy the recordings, or everything"),
        ("doctor", run_doctor, "check clock, disk, runtime, broker, certificates and battery"),
    ):
        raw = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, epilog=_EPILOGS.get(name), formatter_class=raw)
        sub.add_argument("--config", type=Path, required=True, help="path of device.toml")
        sub.set_defaults(command=command)
        _ARGUMENTS.get(name, lambda _sub: None)(sub)
    return parser


def _enroll_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--claim", type=Path, required=True, help="claim.json of the study")
    sub.add_argument("--token", required=True, help="the token; - reads it from standard input")
    sub.add_argument("--bundle", type=Path, help="the study's model; needed where the study is not in device.toml yet")
    sub.add_argument("--count", type=int, default=12, help="how many names to ask for, 1 to 64 (default 12)")
    sub.add_argument("--wait", type=float, default=900.0, metavar="S", help="longest wait for an answer (default 900)")
    sub.add_argument("--anew", action="store_true", help="forget a request for names that was not answered")


def _import_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recordings", type=Path, help=".csv (docs/recordings.md), or .npz with x [n, ...] and y [n]")
    sub.add_argument("--stream", default="default", help="stream of records (default: default)")
    sub.add_argument("--hop", type=int, help=".csv: samples between the starts of windows (default: no overlap)")
    sub.add_argument("--unit", action="append", default=[], metavar="CHANNEL=UNIT", help=".csv: unit of a channel")
    sub.add_argument("--rate", type=float, metavar="HZ", help=".csv without a column t_s: its sampling rate")


def _pseudonym_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=["request", "install", "list"])
    sub.add_argument("file", nargs="?", type=Path, help="install: the operator's answer")
    sub.add_argument("--study", help="task, or tenant/task; needed where there are several studies")
    sub.add_argument("--out", type=Path, help="request: file for the study's operator")
    sub.add_argument("--count", type=int, default=12, help="request: how many names (default 12)")
    sub.add_argument("--anew", action="store_true", help="request: forget a request that was not answered")
    _json_argument(sub)


def _consent_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=["list", "grant", "withdraw"])
    sub.add_argument("study", nargs="?", default="", help="task, or tenant/task")
    _json_argument(sub)


def _ledger_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "action",
        nargs="?",
        choices=["accept-counter"],
        help="accept a ledger whose counter was lost or does not fit; the rest of this period then counts as spent",
    )
    _json_argument(sub)


def _erase_arguments(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", action="store_true", help="recordings and all that was computed from them here")
    which.add_argument("--all", action="store_true", help="the whole store with its key: identities and ledger too")
    sub.add_argument("--yes", action="store_true", help="do not ask")


def _json_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")


_EPILOGS = {"enroll": cli_enroll.EPILOG}
_ARGUMENTS = {
    "enroll": _enroll_arguments,
    "import": _import_arguments,
    "pseudonyms": _pseudonym_arguments,
    "consent": _consent_arguments,
    "ledger": _ledger_arguments,
    "erase": _erase_arguments,
    "status": _json_argument,
    "sent": _json_argument,
    "doctor": _json_argument,
}


if __name__ == "__main__":
    sys.exit(main())
