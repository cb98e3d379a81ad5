"""Who is out is refused everywhere, for good or until taken back; what the broker is told survives a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from cryptography import x509
from sqlalchemy import select

from aggregator.certificates import KeyPair
from aggregator.enrolment import enforcement, revocation
from aggregator.enrolment.enforcement import Enforcement
from aggregator.errors import AggregatorError
from aggregator.store import schema
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from tests.aggregator.enrolment.desks import Asking, DeskOffice
from tests.enrolments import BEGINS_S, CA, NOW_S, PERIOD_S, broken_copy
from tests.virtual_fleet import MemoryJournal


class JoinedDevice:
    """A desk, and a device that has joined."""

    def __init__(self) -> None:
        self.office, self.device = DeskOffice(), Asking("a")
        self.answer = self.office.ask(self.device, self.device.request(self.office.token()))
        self.device.install(self.answer)
        self.names = [one.id for one in self.device.names.installed()]
        self.serials = [
            x509.load_pem_x509_certificate(one.certificate.encode()).serial_number
            for one in decode_file(self.answer.names, PseudonymAnswer).certificates
        ]

    def change(self, state: str, *, name: str = "", now_s: float = NOW_S, module: ModuleType = revocation) -> Any:
        return self.office.change(
            module.change_state, name or self.device.enrolment, state, reason="lost", actor="local:me", now_s=now_s
        )

    def may_send(self, now_s: float = NOW_S) -> list[bool]:
        found = self.office.store.devices.find(self.names)
        return [found[name].holds_at(now_s) and not found[name].is_quarantined for name in self.names]


def test_a_quarantined_device_is_put_aside_and_can_be_taken_back() -> None:
    joined = JoinedDevice()
    assert joined.may_send() == [True, False, False]
    assert joined.change("quarantined").state == "active"
    assert joined.may_send() == [False, False, False]
    joined.change("active")
    assert joined.may_send() == [True, False, False]
    assert joined.office.change(revocation.not_enforced) == []


@pytest.mark.parametrize("called", ["enrolment", "name"])
def test_a_revoked_device_is_out_under_all_its_names_and_for_good(called: str) -> None:
    joined = JoinedDevice()
    joined.change("revoked", name="" if called == "enrolment" else joined.names[1])
    assert joined.may_send() == [False] * 3
    assert joined.may_send(BEGINS_S + PERIOD_S) == [False] * 3
    due = joined.office.change(revocation.not_enforced)
    assert sorted(int(one.serial, 16) for one in due) == sorted(joined.serials)
    for state in ("active", "quarantined", "revoked"):
        with pytest.raises(AggregatorError, match="for good"):
            joined.change(state)


def test_of_two_operators_who_press_the_same_button_one_is_told_that_it_is_done() -> None:
    joined = JoinedDevice()
    joined.change("quarantined")
    with pytest.raises(AggregatorError, match="is quarantined already"):
        joined.change("quarantined")


def test_a_name_that_nobody_enrolled_is_one_sentence() -> None:
    joined = JoinedDevice()
    with pytest.raises(AggregatorError, match="is no enrolled device"):
        joined.change("revoked", name="watch-7")


def test_what_was_done_is_in_the_log() -> None:
    joined = JoinedDevice()
    for state in ("quarantined", "active", "revoked"):
        joined.change(state)
    with joined.office.store.database.reading() as connection:
        rows = connection.execute(select(schema.audit_entries.c.entry).order_by(schema.audit_entries.c.number))
        entries = [msgspec.json.decode(row.entry) for row in rows]
    assert [(one["actor"], one["action"]) for one in entries[1:]] == [
        ("local:me", "device.quarantined"),
        ("local:me", "device.restored"),
        ("local:me", "device.revoked"),
    ]
    assert entries[-1]["detail"]["reason"] == "lost"


class WatchedBroker:
    """A broker that notes what it is told, and fails when it should."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.fails_at = ""

    def reload(self) -> None:
        self._note("reload")

    def end_connection(self, name: str, identity: KeyPair) -> None:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        assert certificate.subject.rfc4514_string() == f"CN={name}"
        assert (certificate.not_valid_after_utc.timestamp() - NOW_S) <= enforcement.TAKEN_OVER_S
        self._note(name)

    def _note(self, what: str) -> None:
        if self.fails_at == what:
            raise AggregatorError(f"{what} fails")
        self.told.append(what)


class Enforced:
    """A revoked device, and what tells the broker."""

    def __init__(self, folder: Path, module: ModuleType = enforcement) -> None:
        self.joined, self.broker, self.journal = JoinedDevice(), WatchedBroker(), MemoryJournal()
        self.crl, self.now_s = folder / "crl.pem", NOW_S
        self.enforcement: Enforcement = module.Enforcement(
            self.joined.office.store.database,
            ca=CA,
            crl=self.crl,
            broker=self.broker,
            journal=self.journal,
            now_s=lambda: self.now_s,
        )

    def listed(self) -> list[int]:
        crl = x509.load_pem_x509_crl(self.crl.read_bytes())
        authority = x509.load_pem_x509_certificate(CA.certificate).public_key()
        assert crl.is_signature_valid(authority)  # type: ignore[arg-type]
        return sorted(one.serial_number for one in crl)


def check_the_list_is_in_force_before_connections_end(module: ModuleType, folder: Path) -> None:
    enforced = Enforced(folder, module)
    assert enforced.enforcement.look() == 0
    enforced.joined.change("revoked")
    assert enforced.enforcement.look() == 3
    assert enforced.listed() == sorted(enforced.joined.serials)
    # Names of later periods have let nobody in yet.
    assert enforced.broker.told == ["reload", enforced.joined.names[0]]
    assert enforced.enforcement.look() == 0
    assert enforced.broker.told == ["reload", enforced.joined.names[0]]


def check_what_failed_is_done_again(module: ModuleType, folder: Path) -> None:
    for fails_at in ("reload", "name"):
        enforced = Enforced(folder, module)
        enforced.joined.change("revoked")
        enforced.broker.fails_at = fails_at if fails_at == "reload" else enforced.joined.names[0]
        assert enforced.enforcement.look() == 0
        assert enforced.enforcement.look() == 0
        assert len(enforced.journal.named("revocation_not_enforced")) == 1
        enforced.broker.fails_at = ""
        assert enforced.enforcement.look() == 3
        assert enforced.broker.told[-2:] == ["reload", enforced.joined.names[0]]
        assert len(enforced.journal.named("revocation_enforced")) == 1


RELOADS = "            self._broker.reload()\n"
ENDS = "            self._end_connections([one.device for one in due if one.not_before_s <= self._now_s()])"
NOTES = "        with self._database.transaction() as connection:"
CHECKS = (check_the_list_is_in_force_before_connections_end, check_what_failed_is_done_again)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(check: Callable[[ModuleType, Path], None], tmp_path: Path) -> None:
    check(enforcement, tmp_path)


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (CHECKS[0], [("            self.write_list()\n", "")]),
        (CHECKS[0], [(RELOADS, "")]),
        (CHECKS[0], [(RELOADS, ""), (f"{ENDS}\n", f"{ENDS}\n{RELOADS}")]),
        (CHECKS[0], [("            note_enforced(connection", "            (lambda *_, **__: 0)(connection")]),
        (CHECKS[1], [(f"            return 0\n{NOTES}", f"            pass\n{NOTES}")]),
    ],
    ids=["no list", "no reload", "reload after", "again and again", "failure is done"],
)
def test_an_enforcement_that_leaves_something_out_is_caught(
    check: Callable[[ModuleType, Path], None], changes: list[tuple[str, str]], tmp_path: Path
) -> None:
    with pytest.raises((AssertionError, FileNotFoundError)):
        check(broken_copy("aggregator.enrolment.enforcement", *changes), tmp_path)


def test_a_certificate_that_has_ended_by_itself_is_listed_no_longer(tmp_path: Path) -> None:
    enforced = Enforced(tmp_path)
    enforced.joined.change("revoked")
    enforced.enforcement.look()
    enforced.now_s = BEGINS_S + 1.5 * PERIOD_S
    enforced.enforcement.write_list()
    assert len(enforced.listed()) == 2


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("aggregator.enrolment.revocation", ('if before.state == "revoked":', "if False:")),
        ("aggregator.enrolment.revocation", ('if state == "revoked":', "if False:")),
    ],
    ids=["comes back", "not listed"],
)
def test_a_revocation_that_does_not_last_is_caught(module: str, change: tuple[str, str]) -> None:
    joined, broken = JoinedDevice(), broken_copy(module, change)
    joined.change("revoked", module=broken)
    came_back = False
    try:
        joined.change("active", module=broken)
        came_back = True
    except AggregatorError:
        pass
    assert came_back or not joined.office.change(revocation.not_enforced)


def test_a_register_that_forgets_the_state_is_caught() -> None:
    broken = broken_copy("aggregator.store.devices", ('self.state != "revoked" and ', ""))
    joined = JoinedDevice()
    joined.change("revoked")
    with joined.office.store.database.reading() as connection:
        found = broken.find_devices(connection, joined.names)
    assert found[joined.names[0]].holds_at(NOW_S)  # it would be let in
    assert joined.may_send() == [False] * 3
