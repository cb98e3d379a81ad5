"""``covey-device doctor``: what is missing for the device to work, a line as soon as each check is done.

It looks, it does not repair. It runs beside the daemon: it takes no lock, changes nothing in the store, and does not
connect under the name that the daemon is connected by.
"""

from __future__ import annotations

import argparse
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from device_client.adapters.counter_file import CounterFile
from device_client.adapters.linux_board import LinuxBoard
from device_client.adapters.system_time import SystemClock
from device_client.assembly import DeviceFiles
from device_client.checks.examined import Examined, not_looked_at
from device_client.checks.findings import AS_ITS_USER, Check, Finding, Result, examine, ok, warning
from device_client.checks.machine import (
    available_memory_bytes,
    check_clock,
    check_core_dumps,
    check_entropy,
    check_memory,
    check_swap,
    clock_is_synchronised,
    core_limit_of,
    resident_bytes,
    swap_limit_of,
)
from device_client.checks.model import check_bundle, check_runtime, records_bytes
from device_client.checks.storage import (
    Volume,
    check_counter,
    check_store_key,
    check_volume,
    newest_line_s,
)
from device_client.checks.study import StudyChecks
from device_client.checks.wearer import check_conditions
from device_client.device import budget_of
from device_client.eligibility import Eligibility
from device_client.ledger import PrivacyLedger
from device_client.ledger.chain import LOG_NAME
from device_client.readiness import policy_of
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.errors import CoveyError
from fl_protocol.terminal import visible

PROBLEMS_EXIT_CODE = 5
_SPARE_BYTES = 64 * 1024 * 1024
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


def run_doctor(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Look at everything; 0 when there is no problem, 5 otherwise.

    Args:
        files: of the device.
        arguments: `json`: whether to print a list of `Finding` in the end, in place of a line each at once.
    """
    findings = []
    for finding in examine(Doctor(files, now_s=time.time()).checks()):
        findings.append(finding)
        if not arguments.json:
            _print_line(finding, sys.stdout)
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(findings), indent=1).decode() + "\n")
    return PROBLEMS_EXIT_CODE if any(one.verdict == "problem" for one in findings) else 0


def _print_line(finding: Finding, stream: TextIO) -> None:
    """One finding for a person; a network check may take seconds, so each is shown at once."""
    study = f"{finding.study}: " if finding.study else ""
    stream.write(f"{finding.verdict:<9}{finding.check:<12}{study}{visible(finding.found.removeprefix(study))}\n")
    if finding.advice:
        stream.write(f"{'':<21}-> {visible(finding.advice)}\n")
    stream.flush()


class Doctor:
    """The checks of one device, in the order in which they are run."""

    def __init__(self, files: DeviceFiles, *, now_s: float) -> None:
        self._files, self._config = files, files.config
        self._device = Examined(files, now_s)

    def checks(self) -> Iterator[Check]:
        """All of them."""
        yield Check("daemon", self._daemon)
        yield Check("clock", self._clock)
        yield Check("entropy", check_entropy)
        yield Check("disk", self._disk)
        yield Check("counter", self._counter)
        yield Check("store key", self._key)
        yield Check("ledger", self._ledger)
        yield Check("swap", self._swap)
        yield Check("core dumps", lambda: check_core_dumps(core_limit_of(self._device.process)))
        for study in self._config.studies:
            yield Check("bundle", lambda study=study: check_bundle(self._files.open_bundle(study), study), study.study)  # type: ignore[misc]
            yield Check("runtime", lambda study=study: check_runtime(self._files.open_bundle(study)), study.study)  # type: ignore[misc]
        yield Check("memory", self._memory)
        yield Check("conditions", self._conditions)
        for study in self._config.studies:
            yield from StudyChecks(self._device, study).checks()

    def _daemon(self) -> Result:
        path = self._files.control_socket
        try:
            pid = self._device.daemon_pid
        except PermissionError:
            return warning(f"this user may not speak to the daemon at {path}", AS_ITS_USER)
        if pid is not None:
            return ok(f"runs as process {pid}; covey-device status says what it does")
        return ok("does not run" if not path.exists() else f"does not run; {path} is left of one that was killed")

    def _clock(self) -> Result:
        seen = {"the installed software": Path(__file__).stat().st_mtime}
        newest_s = newest_line_s(self._files.store_folder / LOG_NAME)
        if newest_s is not None:
            seen["the ledger's newest line"] = newest_s
        return check_clock(
            self._device.now_s,
            seen=seen,
            synchronised=clock_is_synchronised(),
            has_own_clock=Path("/sys/class/rtc/rtc0").exists(),
        )

    def _disk(self) -> Result:
        wanted_bytes = self._config.device.maximum_outbox_bytes + self._record_bytes() + _SPARE_BYTES
        return check_volume(Volume.of(self._files.store_folder), wanted_bytes=wanted_bytes, uid=os.geteuid())

    def _counter(self) -> Result:
        folder, store = Volume.of(self._files.counter_file.parent), Volume.of(self._files.store_folder)
        found = check_volume(folder, wanted_bytes=0, uid=os.geteuid())
        return found if found.verdict == "problem" else check_counter(folder, store=store)

    def _key(self) -> Result:
        is_credential = self._config.device.store_key.startswith("credential:")
        if is_credential and "CREDENTIALS_DIRECTORY" not in os.environ:
            found = "the store key is a credential, which systemd passes to the daemon only"
            if self._device.daemon_runs:
                return ok(f"{found}; the daemon runs, so it has it")
            return warning(found, "to check it, run this under systemd-run as docs/raspberry-pi.md shows")
        folder = self._files.store_folder
        store_uid = folder.stat().st_uid if folder.exists() else None
        return check_store_key(self._files.key_path(), is_credential=is_credential, store_uid=store_uid)

    def _ledger(self) -> Result:
        if self._device.daemon_runs:
            return ok("held by the running daemon; covey-device ledger shows it")
        try:
            store = self._device.store
        except CoveyError as error:
            return not_looked_at(error)
        path = self._files.counter_file
        counter = CounterFile(SystemDisk(path.parent), path.name, self._files.store_key())
        ledger = PrivacyLedger(store, counter, budget_of(self._config))
        spent, allowed = ledger.spent_epsilon, self._config.privacy.epsilon
        return ok(f"whole, and its counter agrees: epsilon {spent:.4f} of {allowed:g} is spent in this period")

    def _swap(self) -> Result:
        process = self._device.process
        return check_swap(swap_limit=swap_limit_of(process) if process is not None else None)

    def _memory(self) -> Result:
        process = self._device.process
        return check_memory(
            available_memory_bytes(),
            # This process has just loaded and run every model.
            program_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            records_bytes=self._record_bytes(),
            daemon_bytes=resident_bytes(process) if process is not None else 0,
        )

    def _record_bytes(self) -> int:
        """Of all recordings that may be kept, as far as the bundles can be read."""
        streams: dict[str, int] = {}
        for study in self._config.studies:
            try:
                bundle = self._files.open_bundle(study)
            except CoveyError:  # reported by its own check
                continue
            streams[study.stream] = records_bytes(bundle, maximum_count=self._config.records.maximum_count)
        return sum(streams.values())

    def _conditions(self) -> Result:
        conditions = LinuxBoard(self._config.board).read()
        blocked = Eligibility(policy_of(self._config.eligibility)).update(
            conditions, now_s=self._device.now_s, local_time_s=SystemClock().local_time_s()
        )
        return check_conditions(conditions, blocked)
