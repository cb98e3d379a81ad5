"""The helper's configuration file (TOML), decoded strictly; every key is documented here."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fl_protocol.broker_config import BrokerConfig
from fl_protocol.enrolment import DAY_S
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.messages import KemName, Name

Days = Annotated[float, Meta(gt=0, le=3660)]


class HelperSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The helper itself.

    Args:
        name: on the wire; on each broker also the MQTT client id, and so the certificate's common name.
        operator: who runs it, as devices pin it.
        identity: file with its Ed25519 key (32 raw bytes), readable by its owner only.
        store: path of its SQLite file.
        minimum_cohort: fewest updates it ever adds up, whatever a manifest says; default 8.
        kem: of the keys that seeds are sealed to; default ``mlkem768-x25519``.
        key_days: after how many days it makes a new key; default 1.
        key_valid_days: for how many days rounds may use a key; default 3.
        key_grace_days: how much longer it keeps the private key, for requests that come late; default 1.
        answer_days: for how many days it keeps an answer's bytes, to send them again; default 30. That it answered is
            never forgotten.
        most_refusals: how many refusals are kept in full; of older ones only the number; default 10,000.
        request_bytes: most that half-received requests of one study take in memory; default 32 MiB.
    """

    name: Name
    operator: Name
    identity: str
    store: str
    minimum_cohort: Annotated[int, Meta(ge=2)] = 8
    kem: KemName = "mlkem768-x25519"
    key_days: Days = 1.0
    key_valid_days: Days = 3.0
    key_grace_days: Days = 1.0
    answer_days: Days = 30.0
    most_refusals: Annotated[int, Meta(ge=1)] = 10_000
    request_bytes: Annotated[int, Meta(ge=MAX_TRANSFER_BYTES)] = 2 * MAX_TRANSFER_BYTES

    def __post_init__(self) -> None:
        if self.key_valid_days <= self.key_days:
            raise ValueError(
                f"expected key_valid_days above key_days ({self.key_days:g}), got {self.key_valid_days:g}: or there "
                "would be times without a valid key"
            )

    @property
    def answers_kept_s(self) -> float:
        """`answer_days` in seconds."""
        return self.answer_days * DAY_S


class StudySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One study that it helps.

    Args:
        tenant: its name on the wire.
        aggregator_key: the aggregator's Ed25519 key, 64 hex digits, as ``covey-aggregator init`` prints it.
        broker: where requests come from; without it they come over HTTPS only.
        ca: PEM file of the CA, or of several, whose certificates make devices' pseudonyms known; by default none.
        allow_listed: whether devices of this helper's own register are known; default true.
    """

    tenant: Name
    aggregator_key: str
    broker: BrokerConfig | None = None
    ca: str | None = None
    allow_listed: bool = True

    def __post_init__(self) -> None:
        if self.ca is None and not self.allow_listed:
            raise ValueError(f"study {self.tenant}: expected a ca where allow_listed is false, or no device is known")


class HttpsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Requests over HTTPS, TLS 1.3 with client certificates (needs ``pip install covey[helper]``).

    Args:
        host, port: address to listen on.
        certificate, key: PEM files of this server.
        client_ca: PEM file of the CA whose certificates may connect, and no others.
    """

    host: Annotated[str, Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    certificate: str
    key: str
    client_ca: str


class HelperConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole ``helper.toml``: ``[helper]``, one ``[[study]]`` for each study, maybe ``[https]``."""

    helper: HelperSection
    studies: Annotated[tuple[StudySection, ...], Meta(min_length=1)] = msgspec.field(name="study")
    https: HttpsSection | None = None

    def __post_init__(self) -> None:
        tenants = [study.tenant for study in self.studies]
        if len(set(tenants)) < len(tenants):
            raise ValueError(f"expected each study once, got {', '.join(tenants)}")
        silent = [study.tenant for study in self.studies if study.broker is None and self.https is None]
        if silent:
            raise ValueError(f"study {silent[0]}: expected a [study.broker] or a section [https], or nobody can ask")
