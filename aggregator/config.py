"""The aggregator's configuration file (TOML), decoded strictly; every key is documented here.

Tasks have files of their own (`aggregator.task_file`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from aggregator.alerts.events import EVENTS, WebhookEvent
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.helper_config import HelperPin, pinned
from fl_protocol.joining import Address
from fl_protocol.messages import Name


class AggregatorSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The aggregator itself.

    Args:
        tenant: name on the wire.
        database: SQLAlchemy URL (``postgresql+psycopg://...``), or the path of an SQLite file.
        signing_key: file with its Ed25519 key (32 raw bytes), readable by its owner only.
        client_id: MQTT client id, also the certificate's common name.
        blobs: folder, or fsspec URL (``s3://bucket/prefix``), for models and sums; default: a folder beside the SQLite
            file. With a database on another machine it must be named.
        reassembly_bytes: most that half-received updates take in memory; default 256 MiB.
        device_bytes_a_minute: what one device may send before it is throttled; default 48 MiB.
        device_transfers_a_minute: updates one device may begin before it is throttled; default 60.
        metrics_port: loopback port for Prometheus; default none.
    """

    tenant: Name
    database: str
    signing_key: str
    client_id: Name = "aggregator"
    blobs: str | None = None
    reassembly_bytes: Annotated[int, Meta(ge=2**24)] = 256 * 2**20
    device_bytes_a_minute: Annotated[int, Meta(ge=2**16)] = 48 * 2**20
    device_transfers_a_minute: Annotated[int, Meta(ge=1)] = 60
    metrics_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None


class HelperSection(HelperPin, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One helper of secure rounds, pinned; see `fl_protocol.helper_config.HelperPin` for name, operator and key.

    Args:
        url: ``https://host:port``, to ask it over HTTPS; by default it is asked over the broker.
        ca: PEM file of the CA that certified it; with `url` only, as the next two.
        certificate: PEM file of the aggregator's own certificate.
        certificate_key: PEM file of its key.
    """

    url: Annotated[str, Meta(pattern=r"^https://[^/:@]+:[0-9]{1,5}\Z")] | None = None
    ca: str | None = None
    certificate: str | None = None
    certificate_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        files = (self.ca, self.certificate, self.certificate_key)
        if any(one is None for one in files) if self.url is not None else any(files):
            raise ValueError(f"helper {self.name}: url, ca, certificate and certificate_key go together")


class EnrolmentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where devices join by themselves (``covey-aggregator enrolment``).

    Args:
        ca: folder of the CA.
        key: file with the desk's HPKE key, which requests are sealed to; readable by its owner only.
        broker: the claim broker, with the desk's certificate.
        client_id: of the desk at both brokers, also its certificate's common name.
        public: where devices find the study's broker; default: as the section ``broker`` has it.
        public_claims: where they find the claim broker; default: as `broker` has it.
        period_days: how long each pseudonym is used, 2 to 366.
        requests_a_minute: taken at most; further ones are told when to come again.
        crl: the list of revoked certificates that the broker looks at; default: none, and nobody can be revoked at the
            broker (their updates are refused all the same).
        reload: command that has the broker read it again, such as ``["systemctl", "reload", "mosquitto"]``.
    """

    ca: str
    key: str
    broker: BrokerConfig
    client_id: Name = "enrolment"
    public: Address | None = None
    public_claims: Address | None = None
    period_days: Annotated[int, Meta(ge=2, le=366)] = 30
    requests_a_minute: Annotated[int, Meta(ge=1, le=1_000_000)] = 3000
    crl: str | None = None
    reload: tuple[str, ...] = ()


class ApiSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The HTTP API (`covey-aggregator api`).

    Args:
        host: address to listen on; default 127.0.0.1.
        port: TCP; default 8443. 0 takes one that is free.
        certificate: PEM file of its certificate, with the chain; on another address than loopback it is needed.
        key: PEM file of the certificate's key.
        requests_a_minute: of one token; default 600.
        address_requests_a_minute: of one address, or the /64 of an IPv6 one; default 1,200.
        unknown_tokens_a_minute: requests of one address with tokens that were not seen in the last five minutes, each
            of which costs a slow hash; default 30.
        metrics_port: loopback port for Prometheus; default none.
        aggregator_key: the aggregator's public key, 64 hex digits, as ``covey-aggregator init`` prints it: for
            verifying the audit log; default: that is left to ``covey-aggregator audit verify``.
        dashboard: whether the dashboard is served as well, at /dashboard (`pip install 'covey[dashboard]'`).
        joules_per_update: what an update costs a device on average, as the operator has measured; the dashboard tells
            energy as an estimate from it, and nothing about energy without.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8443
    certificate: str | None = None
    key: str | None = None
    requests_a_minute: Annotated[int, Meta(ge=1)] = 600
    address_requests_a_minute: Annotated[int, Meta(ge=1)] = 1200
    unknown_tokens_a_minute: Annotated[int, Meta(ge=1)] = 30
    metrics_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    aggregator_key: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    dashboard: bool = False
    joules_per_update: Annotated[float, Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("api: certificate and key go together")
        # Security: a token that travels in the clear is everybody's.
        if self.certificate is None and self.host not in {"127.0.0.1", "::1", "localhost"}:
            raise ValueError(f"api: without certificate and key only loopback is listened on, got host {self.host}")


class WebhookSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where an operator is told what happens (``[[webhook]]``).

    Args:
        name: of the operator's choice.
        url: ``https://host/path``; ``http://`` on loopback alone.
        secret: file with the shared secret (``covey-aggregator webhook secret``), readable by its owner only.
        events: that are told; default all.
        ca: PEM file of the CA that certified the receiver; default: those that the system trusts.
        timeout_s: longest wait for its answer.
    """

    name: Name
    url: str
    secret: str
    events: tuple[WebhookEvent, ...] = EVENTS
    ca: str | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 10.0


class AggregatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole ``aggregator.toml``.

    Args:
        helpers: of secure rounds (``helpers = [{ name = ..., operator = ..., key = ... }]``); tasks use all of them, or
            those that they name.
        enrolment: how devices join by themselves; by default they do not.
        api: the HTTP API; None without.
        webhook: where an operator is told what happens.
    """

    aggregator: AggregatorSection
    broker: BrokerConfig
    helpers: tuple[HelperSection, ...] = ()
    enrolment: EnrolmentSection | None = None
    api: ApiSection | None = None
    webhook: tuple[WebhookSection, ...] = ()

    def __post_init__(self) -> None:
        pinned(self.helpers)
        names = [one.name for one in self.webhook]
        if len(set(names)) < len(names):
            raise ValueError(f"webhook: expected each name once, got {', '.join(names)}")
