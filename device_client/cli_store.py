"""``covey-device init``, ``import``, ``pseudonyms``, ``run`` and ``erase``: what works on the store itself."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from contextlib import closing

from device_client.adapters.encrypted_files import DATA_SCOPE, KEY_BYTES, EncryptedFiles
from device_client.adapters.system_entropy import system_entropy
from device_client.assembly import DeviceFiles, RealDevice
from device_client.cli_ask import is_running, question
from device_client.config import StudyConfig
from device_client.device_store import create_identity
from device_client.errors import StoreError
from device_client.joining.joiner import kept_state
from device_client.pseudonyms import NoPseudonym, Pseudonyms, date_text
from device_client.recordings.csv_header import CsvFormat
from device_client.recordings.csv_import import CsvProgress, store_csv
from device_client.recordings.npz_import import read_npz
from fl_protocol.adapters.config_files import pinned_key, read_file
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.signing import public_key_hex
from fl_protocol.terminal import visible

_ASK_FOR_MORE_S = 60 * 86_400.0
"""How long before the last pseudonym ends others should be asked for."""


def init(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Make keys where there are none."""
    with closing(files.open_store(create=True)) as store:
        for study in files.config.studies:
            if study.id is not None:
                key = create_identity(store, study.study, os.urandom)
                print(public_key_hex(key.public_key()))
    if all(study.id is None for study in files.config.studies):
        print("the store is ready; next: covey-device enroll, or covey-device pseudonyms request")
    return 0


def import_records(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Store recordings from a file."""
    with RealDevice.open(files.path) as device:
        target = device.targets().get(arguments.stream)
        if target is None:
            raise ConfigError(f"--stream {arguments.stream}: expected one of {', '.join(sorted(device.streams))}")
        if arguments.recordings.suffix.lower() == ".csv":
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
        print(visible(f"  {note}"))
    return 0


def pseudonyms(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Ask for names on the wire, install the answer, or list them."""
    study = files.config.study_named(arguments.study)
    action = {"request": _request_names, "install": _install_names, "list": _list_names}[arguments.action]
    with closing(files.open_store()) as store:
        kept = kept_state(store, study.study)
        if arguments.action == "request" and kept is not None and kept.request is not None:
            raise ConfigError(f"{study.study}: its desk is being asked for names; go on with covey-device enroll")
        names = Pseudonyms(store, tenant=study.tenant, task=study.task, tls_keys=files.tls_keys)
        action(files, study, names, arguments)
        if arguments.action == "list" and kept is not None and kept.membership is not None and not arguments.json:
            print(f"{study.study}: enrolled as {kept.membership.enrolment}; the daemon renews its names by itself")
    return 0


def _request_names(_files: DeviceFiles, study: StudyConfig, names: Pseudonyms, arguments: argparse.Namespace) -> None:
    """Write the request for the operator."""
    if arguments.out is None:
        raise ConfigError("pseudonyms request: expected --out FILE")
    if names.waiting and not arguments.anew:
        print("the request of before is still open and was written again; --anew makes another")
    request = names.prepare(count=arguments.count, entropy=system_entropy, anew=arguments.anew)
    try:
        write_atomic(arguments.out, request)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: cannot be written ({error.strerror})") from error
    print(
        f"{arguments.out}: a request for {names.waiting} pseudonyms in {study.study}; hand it to the study's operator, "
        "who runs covey-aggregator device admit"
    )


def _install_names(files: DeviceFiles, study: StudyConfig, names: Pseudonyms, arguments: argparse.Namespace) -> None:
    """Check and take the operator's answer."""
    if arguments.file is None:
        raise ConfigError("pseudonyms install: expected the file with the operator's answer")
    key = pinned_key(files.path, "study.aggregator_key", study.aggregator_key)
    new = names.install(read_file(arguments.file, "the answer"), aggregator_key=key)
    first, last = date_text(new[0].period.begins_s), date_text(new[-1].period.ends_s)
    print(f"{study.study}: {len(new)} pseudonyms, one after the other, {first} to {last}")
    print(f"delete {arguments.file}: it tells which pseudonyms are this device's")


def _list_names(_files: DeviceFiles, study: StudyConfig, names: Pseudonyms, arguments: argparse.Namespace) -> None:
    """One line for each, and what to do."""
    now_s = time.time()
    if arguments.json:
        periods = [(one.id, one.period) for one in names.installed()]
        listed = [{"id": name, "begins_s": period.begins_s, "ends_s": period.ends_s} for name, period in periods]
        print(json.dumps({"study": study.study, "waiting": names.waiting, "pseudonyms": listed}, indent=1))
        return
    print("\n".join(map(visible, names.describe(now_s))))
    current, lasts_s = names.current(now_s), names.lasts_until_s()
    if isinstance(current, NoPseudonym):
        print(current.words)
    elif lasts_s is not None and lasts_s - now_s < _ASK_FOR_MORE_S and not names.waiting:
        print(
            f"{study.study}: the last pseudonym ends on {date_text(lasts_s)}; make a request with covey-device "
            "pseudonyms request"
        )


def run(files: DeviceFiles, _arguments: argparse.Namespace) -> int:
    """Run the daemon until SIGINT or SIGTERM."""
    return run_until_stopped(RealDevice.open(files.path, journal=JsonLines()))


def run_until_stopped(opened: RealDevice) -> int:
    """Run a device's daemon until SIGINT or SIGTERM, then close it."""
    with opened as device:
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
        _erase_data(files)
        print(
            "erased: recordings, personal layers, pending updates. Kept: identities, consents and the ledger, since "
            "what was released stays released"
        )
        return 0
    _erase_all(files)
    print("erased: the store, its key and the ledger")
    return 0


def _erase_data(files: DeviceFiles) -> None:
    """Through the running daemon, or on the store itself, which works with recordings that cannot be opened."""
    if is_running(files):
        question(files, "erase data")
        return
    with closing(files.open_store()) as store:
        store.shred(DATA_SCOPE)


def _erase_all(files: DeviceFiles) -> None:
    """Destroys without the key, so that it works with one that is lost, and when it is run again after a power cut."""
    with closing(EncryptedFiles.in_folder(files.store_folder, bytes(KEY_BYTES))) as store:
        store.shred_all(lambda: _destroy_key(files))
    shutil.rmtree(files.store_folder, ignore_errors=True)
    try:  # under the old key nobody could read it, and a new ledger would be refused
        files.counter_file.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"the counter {files.counter_file} cannot be removed ({error.strerror})") from error


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
    except FileNotFoundError:
        return
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


def _csv_format(arguments: argparse.Namespace) -> CsvFormat:
    """What the command line says of a CSV file. Raises ConfigError."""
    units = {}
    for text in arguments.unit:
        channel, equals, unit = text.partition("=")
        if not equals:
            raise ConfigError(f"--unit {text}: expected CHANNEL=UNIT, such as ax=m/s^2")
        units[channel] = unit
    try:
        return CsvFormat(units=units, sampling_rate_hz=arguments.rate, hop=arguments.hop, stream=arguments.stream)
    except LocalMisuseError as error:
        raise ConfigError(f"--rate, --hop: {error}") from error


def _show_progress(now: CsvProgress) -> None:
    """How far an import is, on one line of the terminal."""
    share = 100 * now.bytes_read / max(1, now.total_bytes)
    end = "\n" if now.bytes_read >= now.total_bytes else "\r"
    print(f"{share:5.1f} %  {now.rows:,} rows", end=end, file=sys.stderr, flush=True)
