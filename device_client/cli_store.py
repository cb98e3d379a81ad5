"""``covey-device init``, ``import``, ``pseudonyms``, ``run`` and ``erase``: what works on the store itself."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from contextlib import closing

from device_client.adapters.system_entropy import system_entropy
from device_client.assembly import DeviceFiles, RealDevice
from device_client.cli_ask import question
from device_client.config import StudyConfig
from device_client.device_store import create_identity
from device_client.errors import StoreError
from device_client.pseudonyms import Pseudonyms
from device_client.recordings.csv_header import CsvFormat
from device_client.recordings.csv_import import CsvProgress, store_csv
from device_client.recordings.npz_import import read_npz
from fl_protocol.adapters.config_files import pinned_key, read_file
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_hex


def init(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Make keys where there are none."""
    with closing(files.open_store(create=True)) as store:
        for study in files.config.studies:
            if study.id is not None:
                key = create_identity(store, study.study, os.urandom)
                print(public_key_hex(key.public_key()))
    if all(study.id is None for study in files.config.studies):
        print("the store is ready; next: covey-device pseudonyms request")
    return 0


def import_records(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Store recordings from a file."""
    with RealDevice.open(files.path) as device:
        target = device.targets().get(arguments.stream)
        if target is None:
            raise ConfigError(f"--stream {arguments.stream}: expected one of {', '.join(sorted(device.streams))}")
        if arguments.recordings.suffix == ".csv":
            result = store_csv(
                arguments.recordings,
                target=target,
                file_format=_csv_format(arguments),
                now_s=time.time(),
                progress=_show_progress if sys.stderr.isatty() else None,
            )
            stored, notes = result.stored, [*result.notes]
            if result.left_out:
                notes.append(f"{result.left_out} rows were left out: without a label, or shorter than a window")
        else:
            records = read_npz(arguments.recordings, input=target.input, label=target.label)
            stored, notes = target.append(records.x, records.y, at_s=time.time()), []
    print(f"{stored} windows stored, encrypted, in {files.config.device.store}")
    for note in notes:
        print(f"  {note}")
    return 0


def pseudonyms(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Ask for names, install the answer, or list them."""
    study = _one_study(files, arguments.study)
    with closing(files.open_store()) as store:
        names = Pseudonyms(store, tenant=study.tenant, task=study.task)
        if arguments.action == "list":
            print("\n".join(names.describe(time.time())))
            return 0
        if arguments.file is None:
            raise ConfigError(f"pseudonyms {arguments.action}: expected --file FILE")
        if arguments.action == "request":
            request = names.prepare(count=arguments.count, entropy=system_entropy, anew=arguments.anew)
            try:
                write_atomic(arguments.file, request, mode=0o644)
            except OSError as error:
                raise ConfigError(f"--file {arguments.file}: cannot be written ({error.strerror})") from error
            print(f"{names.waiting} names asked for; hand {arguments.file} to the operator of {study.study}")
            return 0
        key = pinned_key(files.path, "study.aggregator_key", study.aggregator_key)
        new = names.install(read_file(arguments.file, "--file"), aggregator_key=key)
        print(f"{len(new)} names installed")
        print("\n".join(names.describe(time.time())))
    return 0


def run(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Run the daemon until SIGINT or SIGTERM."""
    with RealDevice.open(files.path, journal=JsonLines()) as device:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda _signum, _frame: device.stop())
        device.listen()
        device.run()
    return 0


def erase(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Destroy the recordings, or everything."""
    what = "the recordings and all that was computed from them" if arguments.data else "the whole store with its key"
    if not arguments.yes and not _agreed(f"Destroy {what} in {files.store_folder}? There is no way back. [yes/no] "):
        print("nothing was erased")
        return 1
    if arguments.data:
        question(files, "erase data")
        print(
            "erased: recordings, personal layers, pending updates. Kept: identities, consents and the ledger, since "
            "what was released stays released"
        )
        return 0
    with closing(files.open_store()) as store:
        _destroy_key(files)
        store.shred_all()
    shutil.rmtree(files.store_folder, ignore_errors=True)
    print("erased: the store, its key and the ledger")
    return 0


def _destroy_key(files: DeviceFiles) -> None:
    """Without its key nothing in the store can be read, whatever the disk still holds."""
    path = files.key_path()
    try:
        size = path.stat().st_size
        with path.open("r+b") as stream:
            stream.write(os.urandom(size))
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()
    except OSError as error:
        raise StoreError(
            f"the store key {path} cannot be destroyed ({error.strerror}); if systemd passes it, delete the "
            "credential's file, then run this again"
        ) from error


def _agreed(text: str) -> bool:
    """Whether a person says yes."""
    try:
        return input(text).strip().lower() == "yes"
    except EOFError:
        return False


def _one_study(files: DeviceFiles, name: str | None) -> StudyConfig:
    """The study that is meant. Raises ConfigError."""
    found = [study for study in files.config.studies if name in {None, study.study, study.task}]
    if len(found) != 1:
        known = ", ".join(study.study for study in files.config.studies)
        raise ConfigError(f"study {name or ''}: expected one of {known}")
    return found[0]


def _csv_format(arguments: argparse.Namespace) -> CsvFormat:
    """What the command line says of a CSV file. Raises ConfigError."""
    units = {}
    for text in arguments.unit:
        channel, equals, unit = text.partition("=")
        if not equals:
            raise ConfigError(f"--unit {text}: expected CHANNEL=UNIT, such as ax=m/s^2")
        units[channel] = unit
    return CsvFormat(units=units, sampling_rate_hz=arguments.rate, hop=arguments.hop, stream=arguments.stream)


def _show_progress(now: CsvProgress) -> None:
    """How far an import is, on one line of the terminal."""
    share = 100 * now.bytes_read / max(1, now.total_bytes)
    end = "\n" if now.bytes_read >= now.total_bytes else "\r"
    print(f"{share:5.1f} %  {now.rows:,} rows", end=end, file=sys.stderr, flush=True)
