"""Who was thrown out after the backup stays out, if the broker's last list is there to tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from sqlalchemy import select

from aggregator import certificates
from aggregator import restore as restoring
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.audit.log import AuditLog
from aggregator.backup import backup
from aggregator.certificates import make_ca, make_crl, read_crl
from aggregator.enrolment import revocation
from aggregator.enrolment.enforcement import Enforcement
from aggregator.errors import AggregatorError
from aggregator.restore import restore
from aggregator.store import schema
from aggregator.store.database import Database
from aggregator.store.devices import Devices
from tests.aggregator.enrolment.test_revocation import JoinedDevice, WatchedBroker
from tests.aggregator.operator_desk import Operator, one_sentence, operator
from tests.contracts.databases import new_url
from tests.enrolments import CA, NOW_S, broken_copy
from tests.virtual_fleet import MemoryJournal

__all__ = ["operator"]
LATER_S = NOW_S
"""What `WatchedBroker` goes by."""
STRANGER = 0xABCDEF
"""Serial number of a device that joined after the backup, and was thrown out too."""


class LostService:
    """A service with two devices of which one was thrown out after the backup."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.joined = folder, JoinedDevice()
        store = self.joined.office.store
        backup(store.database, store.blobs, folder / "monday.backup", now_s=NOW_S)
        self.joined.change("revoked", now_s=NOW_S)
        listed = [(serial, NOW_S) for serial in [*self.joined.serials, STRANGER]]
        self.crl = make_crl(CA, listed, now_s=NOW_S)
        self.database = Database(url)

    def restored(self, *, with_list: bool = True) -> restoring.Restored:
        listed = read_crl(self.crl, CA.certificate) if with_list else None
        blobs = LocalBlobs(self.folder / "blobs")
        return restore(
            self.folder / "monday.backup", self.database, blobs, now_s=LATER_S, actor="local:anna", listed=listed
        )

    def may_send(self) -> list[bool]:
        found = Devices(self.database).find(self.joined.names)
        return [found[name].holds_at(LATER_S) for name in self.joined.names if name in found]

    def list_written(self, broker: WatchedBroker) -> set[int]:
        """What the desk has the broker refuse at its next start."""
        crl = self.folder / "crl.pem"
        desk = Enforcement(self.database, ca=CA, crl=crl, broker=broker, journal=MemoryJournal(), now_s=lambda: LATER_S)
        desk.look()
        return {one.serial_number for one in x509.load_pem_x509_crl(crl.read_bytes())}


@pytest.fixture(params=["sqlite", "postgresql"])
def lost(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LostService]:
    service = LostService(tmp_path, new_url(request, tmp_path, str(request.param)))
    yield service
    service.database.close()


def test_who_is_on_the_brokers_list_stays_out(lost: LostService) -> None:
    done = lost.restored()
    assert done.revoked == (1, 1)
    assert not any(lost.may_send())
    broker = WatchedBroker()
    assert lost.list_written(broker) == {*lost.joined.serials, STRANGER}
    # Connections are ended of those alone whose name is known, and that may be up.
    assert broker.told == ["reload", lost.joined.names[0]]
    stranger, device, told = AuditLog(lost.database).page(limit=3)
    assert (stranger.action, stranger.subject, stranger.actor) == ("certificate.revoked", "abcdef", "local:anna")
    assert (device.action, device.subject) == ("device.revoked", lost.joined.device.enrolment)
    assert "broker's list" in str(device.detail["reason"])
    assert told.action == "database.restored"


def test_helpers_and_broker_are_told_of_names_alone(lost: LostService) -> None:
    lost.restored()
    with lost.database.reading() as connection:
        found = revocation.revoked_certificates(connection, now_s=LATER_S)
    assert "" in {one.device for one in found}
    assert {one.device for one in found if one.not_before_s <= LATER_S} == {lost.joined.names[0]}


def test_without_the_list_they_are_back_as_the_command_says(lost: LostService) -> None:
    assert lost.restored(with_list=False).revoked is None
    assert lost.may_send()[0]


def test_a_list_that_the_backup_knows_changes_nothing(tmp_path: Path) -> None:
    service = LostService(tmp_path, f"sqlite:///{tmp_path / 'a.db'}")
    store = service.joined.office.store
    (tmp_path / "monday.backup").unlink()
    backup(store.database, store.blobs, tmp_path / "monday.backup", now_s=NOW_S)
    service.crl = make_crl(CA, [(serial, NOW_S) for serial in service.joined.serials], now_s=NOW_S)
    assert service.restored().revoked == (0, 0)
    assert [one.action for one in AuditLog(service.database).page(limit=2)] == ["database.restored", "device.revoked"]
    service.database.close()


@pytest.mark.parametrize(
    "change",
    [
        ("change_state(connection, enrolment, ", "(lambda *_, **__: None)(connection, enrolment, "),
        ("sorted(serials.keys() - known)", "[]"),
    ],
    ids=["devices", "certificates"],
)
def test_a_restore_that_lets_somebody_back_in_is_caught(
    lost: LostService, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    broken = broken_copy("aggregator.enrolment.revocation", change)
    monkeypatch.setattr(restoring, "revoke_again", broken.revoke_again)
    with pytest.raises(AssertionError):
        test_who_is_on_the_brokers_list_stays_out(lost)


OTHER = make_ca("another", now_s=NOW_S)


def check_only_the_studys_ca_is_believed(read: object) -> None:
    with pytest.raises(AggregatorError, match="not signed by the study's CA"):
        read(make_crl(OTHER, [(1, NOW_S)], now_s=NOW_S), CA.certificate)  # type: ignore[operator]


def test_a_list_of_another_ca_is_not_believed() -> None:
    check_only_the_studys_ca_is_believed(read_crl)
    with pytest.raises(AggregatorError, match="expected a list of revoked certificates"):
        read_crl(b"no list", CA.certificate)
    with pytest.raises(AggregatorError, match="expected a list of revoked certificates"):
        read_crl(make_crl(CA, [], now_s=NOW_S), b"no certificate")


def test_a_list_that_anybody_may_have_written_is_caught() -> None:
    broken = broken_copy(certificates.__name__, ("if not is_signed or", "if"))
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        check_only_the_studys_ca_is_believed(broken.read_crl)


def test_the_command_takes_the_list_and_says_who_stays_out(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    operator.says("backup", "CONFIG", "--out", "./monday.backup")
    operator.edit("aggregator.toml", 'database = "aggregator.db"', 'database = "second.db"')
    (operator.folder / "crl.pem").write_bytes(make_crl(CA, [(STRANGER, time.time())], now_s=time.time()))
    one_sentence(operator.run("restore", "./monday.backup", "CONFIG", "--crl", "./crl.pem"), 2, "--crl needs broker.ca")
    (operator.folder / "ca.pem").write_bytes(OTHER.certificate)
    with (operator.folder / "aggregator.toml").open("a") as config:
        config.write('ca = "ca.pem"\ncertificate = "c.pem"\nkey = "c.key"\n')
    refused = operator.run("restore", "./monday.backup", "CONFIG", "--crl", "./crl.pem")
    one_sentence(refused, 2, "--crl", "not signed by the study's CA")
    assert not (operator.folder / "second.db").exists()
    (operator.folder / "ca.pem").write_bytes(CA.certificate)
    told = operator.says("restore", "./monday.backup", "CONFIG", "--crl", "./crl.pem").splitlines()
    assert told[-1] == "thrown out again: 0 devices, and 1 certificates whose devices the backup does not know"
    operator.edit("aggregator.toml", 'database = "second.db"', 'database = "third.db"')
    told = operator.says("restore", "./monday.backup", "CONFIG").splitlines()
    assert told[-1].startswith("who was thrown out after ")
    assert "is in again, since a backup cannot know it" in told[-1]


def test_the_lists_entries_end_with_the_list(lost: LostService) -> None:
    lost.restored()
    with lost.database.reading() as connection:
        row = connection.execute(
            select(schema.revoked_certificates).where(schema.revoked_certificates.c.serial == f"{STRANGER:x}")
        ).one()
    ends = x509.load_pem_x509_certificate(CA.certificate).not_valid_after_utc.timestamp()
    assert (row.not_after_s, row.revoked_s, row.enforced_s) == (ends, NOW_S, None)
