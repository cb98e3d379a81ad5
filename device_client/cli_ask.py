"""``covey-device status``, ``consent``, ``ledger`` and ``sent``: questions to the running daemon, or to its store."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import msgspec

from device_client.adapters.line_server import ask, is_listening
from device_client.assembly import DeviceFiles, RealDevice
from device_client.consent import Consents, leave_study
from device_client.control import answer
from device_client.device import budget_of
from device_client.errors import DeviceError, StoreError
from device_client.ledger import PrivacyLedger
from device_client.outbox import Outbox
from device_client.status import Status, status_text
from fl_protocol.errors import ConfigError, CoveyError
from fl_protocol.terminal import visible

_ANSWER_WITHIN_S = 60.0
"""A step of training may have to end before the daemon answers."""


def is_running(files: DeviceFiles) -> bool:
    """Whether the device's daemon runs and can be asked."""
    return is_listening(files.control_socket)


def question(files: DeviceFiles, what: str, *, study: str = "") -> Any:
    """Ask the running daemon; where none runs, open the store and answer here.

    Raises:
        DeviceError: what the device answers, if it is an error.
        CoveyError: the store cannot be opened.
    """
    payload = msgspec.json.encode({"ask": what, "study": study})
    if is_running(files):
        return _value(ask(files.control_socket, payload, timeout_s=_ANSWER_WITHIN_S))
    with RealDevice.open(files.path) as device:
        return _value(answer(device, payload))


def status(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Print the status."""
    found = question(files, "status")
    lines = status_text(msgspec.convert(found, Status))
    _print(found, lines, arguments)
    return 0


def consent(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """List, grant or withdraw."""
    if arguments.action != "list" and not arguments.study:
        known = ", ".join(study.study for study in files.config.studies)
        raise ConfigError(f"consent {arguments.action}: expected the name of a study, one of {known}")
    if arguments.action == "withdraw" and not is_running(files):
        found: Any = _withdraw(files, arguments.study)
    else:
        found = question(files, f"consent {arguments.action}", study=arguments.study)
    if arguments.action == "grant":
        lines = [f"granted: {found['study']}", *_terms(found["terms"])]
    elif arguments.action == "withdraw":
        lines = [f"withdrawn: {found['study']}; {found['dropped']} update(s) that were not delivered are dropped"]
    else:
        lines = [line for study in found for line in _consent_lines(study)]
    _print(found, lines, arguments)
    return 0


def ledger(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Print the ledger, or accept it as it stands."""
    if arguments.action == "accept-counter":
        return _accept_counter(files)
    found = question(files, "ledger")
    _print(found, _ledger_lines(found), arguments)
    return 0


def sent(files: DeviceFiles, arguments: argparse.Namespace) -> int:
    """Print what left the device."""
    found = question(files, "sent")
    lines = [
        f"{_when(one['said_s'])}  {one['task']} round {one['round']}: {one['num_bytes']} bytes as {one['device']}, "
        f"sealed to key {one['recipient_key']}, epsilon by then {_epsilon(one['epsilon'])}, {one['outcome']}"
        for one in found
    ]
    _print(found, lines or ["nothing was ever sent"], arguments)
    return 0


def _withdraw(files: DeviceFiles, name: str) -> dict[str, Any]:
    """Leave a study on the store itself: possible whatever else is wrong with bundle, ledger or recordings."""
    study = files.config.study_named(name).study
    with closing(files.open_store()) as store:
        now_s = datetime.now(timezone.utc).timestamp()
        dropped = leave_study(Consents(store), Outbox(store), study, now_s=now_s)
    return {"study": study, "dropped": dropped}


def _accept_counter(files: DeviceFiles) -> int:
    """A person has looked, and says that the ledger may go on."""
    key = files.store_key()
    store = files.open_store()
    try:
        accepted = PrivacyLedger.reanchor(
            store, files.open_counter(key), budget_of(files.config), now_s=datetime.now(timezone.utc).timestamp()
        )
    finally:
        store.close()
    ends_s = accepted.period_ends_s
    until = f"until {_when(ends_s)}" if ends_s is not None and ends_s < 1e11 else "for good"
    print(f"accepted; {len(accepted.reservations)} charges are known, and the budget counts as spent {until}")
    return 0


def _ledger_lines(found: dict[str, Any]) -> list[str]:
    """The ledger in words."""
    limit = "no limit" if found["epsilon"] is None else f"{found['epsilon']:g}"
    least = "at least " if found["at_least"] else ""
    lines = [f"spent: epsilon {least}{_epsilon(found['spent_epsilon'])} of {limit} at delta {found['delta']:g}"]
    if found["period_days"] is not None:
        ends = f", which ends {_when(found['period_ends_s'])}" if found["period_ends_s"] is not None else ""
        lines[0] += f" in this period of {found['period_days']:g} days{ends}"
        lines.append(f"spent ever: epsilon {least}{_epsilon(found['spent_epsilon_ever'])}")
    lines.append(f"charges: {len(found['lines'])}")
    if found["order"] is not None:
        lines.append(f"enforced at Rényi order {found['order']:g}")
    if found["left_like_the_last"] is not None:
        lines.append(f"left: {found['left_like_the_last']:g} more like the last")
    lines += [f"  {study}: epsilon {_epsilon(spent)}" for study, spent in found["studies"].items()]
    for one in found["lines"]:
        if one["purpose"] == "count":
            what = f"a count of records, noise {one['noise_multiplier']:g}"
        else:
            what = (
                f"{one['steps']} step(s), sampling rate {one['sampling_rate']:g}, "
                f"noise multiplier {one['noise_multiplier']:g}"
            )
        lines.append(f"  {_when(one['at_s'])}  {one['task']} round {one['round']}: {what}")
    return lines


def _consent_lines(study: dict[str, Any]) -> list[str]:
    """One study's consent in words."""
    granted = f"granted {_when(study['granted_s'])}" if not study["problem"] else f"does not run: {study['problem']}"
    return [f"{study['study']}: {granted}", *_terms(study["terms"])]


def _terms(terms: dict[str, str]) -> list[str]:
    return [f"  {name}: {value}" for name, value in terms.items()]


def _value(reply: bytes) -> Any:
    """The answer's value. Raises DeviceError for an error."""
    try:
        decoded = json.loads(reply)
    except ValueError as error:
        raise DeviceError(f"the daemon's answer cannot be read ({error}); is it another version?") from error
    if decoded.get("error"):
        kinds: dict[str, type[CoveyError]] = {"configuration": ConfigError, "store": StoreError}
        raise kinds.get(decoded.get("kind", ""), DeviceError)(decoded["error"])
    return decoded.get("value")


def _print(found: Any, lines: list[str], arguments: argparse.Namespace) -> None:
    # JSON escapes by itself whatever is not ASCII.
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(map(visible, lines)))


def _epsilon(value: float | None) -> str:
    return "without bound" if value is None else f"{value:.4f}"


def _when(at_s: float) -> str:
    """A time for people, in UTC; a clock may have been wrong beyond what a date can show."""
    try:
        return datetime.fromtimestamp(at_s, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):
        return f"{at_s:g} s"
