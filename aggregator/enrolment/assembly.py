"""From a configuration file to a desk, and the claims that it takes."""

from __future__ import annotations

import base64
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from aggregator.adapters.broker_control import BrokerControl
from aggregator.admission import Admitter
from aggregator.assembly import AggregatorFiles
from aggregator.ca_folder import load_ca
from aggregator.certificates import KeyPair, issue
from aggregator.config import EnrolmentSection
from aggregator.enrolment.desk import Desk
from aggregator.enrolment.enforcement import Enforcement
from aggregator.enrolment.service import DeskKeys, DeskService, Pacing
from aggregator.in_force import config_of
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.adapters.config_files import read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError
from fl_protocol.helper_config import HelperPin
from fl_protocol.joining import Address, Claim, StudyPins, study_pins
from fl_protocol.message_base import KemName
from fl_protocol.sealing import RoundKey, round_key_bytes
from fl_protocol.signing import public_key_hex

CLAIMANT = "claim"
"""Common name of the certificate that devices make claims with."""
_KEM: KemName = "mlkem768-x25519"
_OTHERS = 0o077


@dataclass(frozen=True)
class DeskFiles:
    """The aggregator's configuration, which has a section on enrolment."""

    files: AggregatorFiles

    @classmethod
    def load(cls, path: Path) -> DeskFiles:
        """Read and check an ``aggregator.toml``. Raises ConfigError."""
        files = AggregatorFiles.load(path)
        if files.config.enrolment is None:
            raise ConfigError(
                f"configuration {path}: expected a section [enrolment] (docs/operations.md), without which no device "
                "can join by itself"
            )
        return cls(files)

    @property
    def section(self) -> EnrolmentSection:
        """The section."""
        assert self.files.config.enrolment is not None  # noqa: S101 - `load` has looked
        return self.files.config.enrolment

    @property
    def ca_folder(self) -> Path:
        """Where the CA is."""
        return relative_to_config(self.files.path, self.section.ca)

    def key(self, *, create: bool = False) -> RoundKey:
        """The desk's HPKE key; with `create`, made where there is none.

        Raises:
            ConfigError: it is missing, of the wrong size, or readable by others.
        """
        path = relative_to_config(self.files.path, self.section.key)
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, os.urandom(round_key_bytes(_KEM)))
        raw = read_file(path, "enrolment.key (covey-aggregator enrolment init makes it)")
        # Security: whoever reads it can read the tokens that devices send, and use them.
        if path.stat().st_mode & _OTHERS:
            raise ConfigError(f"enrolment.key: others can read {path}; run chmod 600 on it")
        if len(raw) != round_key_bytes(_KEM):
            raise ConfigError(f"enrolment.key: expected {round_key_bytes(_KEM)} bytes in {path}, got {len(raw)}")
        return RoundKey(_KEM, raw)

    def claim(self, store: AggregatorStore, task: str, *, now_s: float, valid_s: float) -> Claim:
        """What a study's devices make claims with. Raises ConfigError, AggregatorError, DatabaseError.

        Args:
            store: the database.
            task: of the study.
            now_s: Unix seconds.
            valid_s: how long its certificate is, seconds.
        """
        store.tasks.get(task)
        ca, key, section = load_ca(self.ca_folder), self.key().recipient(), self.section
        identity = issue(ca, CLAIMANT, now_s=now_s, valid_s=valid_s)
        return Claim(
            format="covey-claim-1",
            tenant=self.files.config.aggregator.tenant,
            task=task,
            aggregator_key=public_key_hex(self.files.signing_key().public_key()),
            kem=key.kem,
            enrolment_key=base64.b64encode(key.public_key).decode(),
            ca=ca.certificate.decode(),
            broker=section.public_claims or Address(section.broker.host, section.broker.port),
            certificate=identity.certificate.decode(),
            key=identity.key.decode(),
        )

    def pins(self, store: AggregatorStore) -> dict[str, StudyPins]:
        """What the devices of each task pin."""
        config = self.files.config
        return {
            task: study_pins(
                config_of(spec, task).publisher_pins,
                helpers=tuple(HelperPin(name=one.name, operator=one.operator, key=one.key) for one in config.helpers),
                broker=self.section.public or Address(config.broker.host, config.broker.port),
            )
            for task, spec in store.tasks.specs().items()
            if spec
        }


def assemble_desk(files: DeskFiles, store: AggregatorStore, *, journal: Journal) -> DeskService:
    """A desk ready to run. Raises ConfigError, AggregatorError, DatabaseError."""
    section, aggregator = files.section, files.files
    bell = threading.Event()

    def wait(longest_s: float) -> None:
        bell.wait(longest_s)
        bell.clear()

    transports = [
        make_transport(broker, config=aggregator.path, client_id=section.client_id, wake=bell.set)
        for broker in (section.broker, desk_at_the_studys_broker(files))
    ]
    ca = load_ca(files.ca_folder)
    admitter = Admitter(
        store=store,
        tenant=aggregator.config.aggregator.tenant,
        ca=ca,
        signing_key=aggregator.signing_key(),
        period_days=section.period_days,
    )
    return DeskService(
        Desk(admitter, files.pins(store)),
        tenant=aggregator.config.aggregator.tenant,
        keys=DeskKeys(files.key(), aggregator.signing_key()),
        transports=transports,
        journal=journal,
        now_s=time.time,
        pacing=Pacing(section.requests_a_minute),
        wait=wait,
        enforcement=_enforcement(files, store, ca, journal),
        pins=lambda: files.pins(store),
    )


def desk_at_the_studys_broker(files: DeskFiles) -> BrokerConfig:
    """Where renewals come, with the desk's own certificate in place of the aggregator's."""
    own, study = files.section.broker, files.files.config.broker
    return replace(study, ca=own.ca, certificate=own.certificate, key=own.key)


def _enforcement(files: DeskFiles, store: AggregatorStore, ca: KeyPair, journal: Journal) -> Enforcement | None:
    """What tells the broker of revocations; None where it has no list. Raises ConfigError."""
    section, study = files.section, desk_at_the_studys_broker(files)
    if section.crl is None:
        return None
    if study.ca is None:
        raise ConfigError(
            "enrolment.crl: expected a broker with ca, certificate and key; without TLS nobody is revoked"
        )
    path = files.files.path
    control = BrokerControl(
        host=study.host, port=study.port, ca=relative_to_config(path, study.ca), reload=section.reload
    )
    return Enforcement(
        store.database,
        ca=ca,
        crl=relative_to_config(path, section.crl),
        broker=control,
        journal=journal,
        now_s=time.time,
    )
