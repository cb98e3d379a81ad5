"""Whole studies of masked updates whose devices go by pseudonyms: helpers know them by their certificates alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography import x509
from msgspec.structs import replace
from sqlalchemy import select

from aggregator.admission import Admitter
from aggregator.certificates import make_ca
from aggregator.helper.answering import Study
from aggregator.store import schema
from device_client.config import StudyConfig
from device_client.device import Device
from device_client.pseudonyms import Pseudonym
from device_client.studies import LONGEST_ABSENCE_S
from fl_protocol.enrolment import DAY_S
from tests.system.test_secure_studies import HELPERS, secure_task
from tests.virtual_fleet import AGGREGATOR_KEY, TASK, TENANT, SeededEntropy, VirtualFleet

PERIOD_DAYS = 5
CA = make_ca("covey clinic", now_s=0.0)
KNOWS_THE_CA_ALONE = Study(
    TENANT,
    AGGREGATOR_KEY.public_key(),
    cas=(x509.load_pem_x509_certificate(CA.certificate),),
    allow_listed=False,
)


class PseudonymFleet(VirtualFleet):
    """Devices that go by pseudonyms of five days each, and helpers that know a CA and no register."""

    ca = CA

    def study(self, device: str, **changes: Any) -> StudyConfig:
        return replace(super().study(device, **changes), id=None)

    def enrol(self, device: Device, name: str, study: StudyConfig) -> None:
        """Request, admission and answer, as ``covey-device pseudonyms`` and ``covey-aggregator device admit`` do it."""
        names, answers = device.pseudonyms[study.study], list[bytes]()
        request = names.prepare(count=3, entropy=SeededEntropy(f"{self.seed} {name} pseudonyms"))
        office = Admitter(self.store, TENANT, self.ca, AGGREGATOR_KEY, PERIOD_DAYS)
        office.admit(request, now_s=self.clock.time_s, deliver=answers.append)
        names.install(answers[0], aggregator_key=AGGREGATOR_KEY.public_key())

    def name_of(self, device: str) -> str:
        """Its present name."""
        found = self.devices[device].pseudonyms[f"{TENANT}/{TASK}"].current(self.clock.time_s)
        assert isinstance(found, Pseudonym)
        return found.id


def pseudonym_fleet(folder: Path, kind: type[PseudonymFleet] = PseudonymFleet, **changes: Any) -> PseudonymFleet:
    """Three devices."""
    fleet = kind(folder, devices=0, task=secure_task(**changes), helpers=HELPERS, helped=KNOWS_THE_CA_ALONE)
    for index in range(3):
        fleet.start_device(f"watch-{index}", minimum_helpers=2, minimum_operators=2)
    return fleet


def test_helpers_without_a_register_know_devices_by_their_certificates_and_go_on_when_all_change_their_names(
    tmp_path: Path,
) -> None:
    fleet = pseudonym_fleet(tmp_path, rounds=12)
    fleet.run(until=lambda: fleet.state.committed >= 2)
    assert fleet.state.committed < 12
    before = {fleet.name_of(name) for name in fleet.devices}
    length_s = PERIOD_DAYS * DAY_S
    fleet.clock.time_s = (fleet.clock.time_s // length_s + 1) * length_s
    fleet.run(until=lambda: not any(device.studies.running for device in fleet.devices.values()))
    fleet.clock.time_s += LONGEST_ABSENCE_S
    fleet.run()
    after = {fleet.name_of(name) for name in fleet.devices}
    assert fleet.state.committed == 12
    assert len(before | after) == 6
    with fleet.store.database.reading() as connection:
        assert set(connection.execute(select(schema.updates.c.device)).scalars()) == before | after
    for helper in fleet.helpers.values():
        assert helper.store.devices.all() == []
        assert helper.store.refusals.counts() == {}
        assert helper.store.answers.counts() == {TENANT: 12}


class ForeignFleet(PseudonymFleet):
    """Its devices are admitted by a CA that the helpers do not know, such as one that an aggregator made for Sybils."""

    ca = make_ca("covey clinic", now_s=0.0)


def test_helpers_refuse_every_round_of_devices_that_another_ca_has_admitted(tmp_path: Path) -> None:
    fleet = pseudonym_fleet(tmp_path, ForeignFleet)
    fleet.run(until=lambda: all(helper.store.refusals.counts() for helper in fleet.helpers.values()))
    for helper in fleet.helpers.values():
        assert set(helper.store.refusals.counts()) == {"unsigned"}
        assert all("does not hold under the CA" in one.detail for one in helper.store.refusals.all())
        assert helper.store.answers.counts() == {}
    assert fleet.state.committed == 0
