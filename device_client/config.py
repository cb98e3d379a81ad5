"""The device's configuration file (TOML), decoded strictly; every key is documented here.

A path is relative to the file. A key (`store_key`, a TLS key) may be named ``credential:NAME``: it is then read from
the folder that systemd passes in ``CREDENTIALS_DIRECTORY`` (systemd.exec(5), section Credentials), which can keep it
sealed to a TPM.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from device_client.eligibility import parse_window
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.helper_config import HelperPin, pinned
from fl_protocol.publishers import PublisherPins, publisher_pins
from fl_protocol.topics import NAME_PATTERN

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Percent = Annotated[float, Meta(ge=0, le=100)]
AtLeastZero = Annotated[float, Meta(ge=0)]
Epsilon = Annotated[float, Meta(gt=0)]
Delta = Annotated[float, Meta(gt=0, lt=1)]
LEAST_TELLING_MINUTES = 5.0


class StudyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One study that this device may belong to (``[[study]]``), and what it is pinned to. The wearer grants each.

    Args:
        tenant, task: names on the wire.
        broker: where it is met.
        bundle: path of the model bundle (``*.covey``).
        publisher_key: Ed25519 key of the bundle's only publisher, 64 hex digits; this or `publishers`.
        aggregator_key: Ed25519 key that signs manifests and receipts, 64 hex digits.
        publishers: Ed25519 keys of several publishers, 64 hex digits each, at most 16.
        publisher_threshold: how many of `publishers` must have signed the bundle; must be given with them.
        minimum_bundle_version: refuse an older bundle.
        id: a fixed name on the wire, for trying things out; its certificate is named in `broker`. Without it the device
            goes by pseudonyms that change and bring their certificates with them (``covey-device pseudonyms``).
        role: ``train``, or ``evaluate`` to only measure each global model on the device's own records.
        stream: the stream of records that it trains on.
        epsilon: share of the wearer's budget that this study may spend in a period; all of it by default.
        tags: what this device can do or is, such as ``["imu", "left-wrist"]``: a round that asks for other tags is left
            out, and nothing is said about it. One that asks for a tag learns that whoever takes part has it. None by
            default.
        maximum_participations: rounds of the study that this device ever takes part in; any number by default.
        helpers: helpers of secure aggregation that are trusted not to work together; a round with any other is refused.
            None by default.
        tells_why_every_minutes: how often at most the study is told which of the board's conditions keeps the device
            from training (its battery, charger, use, network, temperature or hours), and only when that has changed;
            at least 5, and 0 to never tell.
    """

    tenant: Name
    task: Name
    broker: BrokerConfig
    bundle: str
    publisher_key: str | None = None
    aggregator_key: str
    publishers: tuple[str, ...] = ()
    publisher_threshold: int | None = None
    minimum_bundle_version: int = 0
    id: Name | None = None
    role: Literal["train", "evaluate"] = "train"
    stream: Name = "default"
    epsilon: Epsilon | None = None
    tags: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    maximum_participations: Annotated[int, Meta(ge=1)] | None = None
    helpers: tuple[HelperPin, ...] = ()
    tells_why_every_minutes: Annotated[float, Meta(ge=0, le=1440)] = 30.0

    def __post_init__(self) -> None:
        pinned(self.helpers)
        _ = self.publisher_pins
        if 0 < self.tells_why_every_minutes < LEAST_TELLING_MINUTES:
            raise ValueError(
                f"tells_why_every_minutes: expected 0 (never) or at least {LEAST_TELLING_MINUTES:g}, for the battery's "
                f"sake, got {self.tells_why_every_minutes:g}"
            )

    @property
    def publisher_pins(self) -> PublisherPins:
        """Whose signatures the bundle needs."""
        return publisher_pins(self.publisher_key, self.publishers, self.publisher_threshold)

    @property
    def study(self) -> str:
        """What the wearer grants and the ledger charges: ``tenant/task``."""
        return f"{self.tenant}/{self.task}"


class DeviceSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What this device keeps, and where.

    Args:
        store: folder of the encrypted store.
        store_key: file with the store's 32-byte key, readable by its owner only, or ``credential:NAME``.
        counter: file that counts the ledger's lines, kept apart from the store, best on another medium: putting back
            an old copy of the store is noticed by it. By default beside the store: its folder's name and ``.counter``.
        control_socket: Unix socket for ``covey-device status`` and its like; by default beside the store:
            its folder's name and ``.sock``.
        maximum_outbox_bytes: sealed updates that may wait for their receipts.
        tls_keys: where the TLS keys of new names are made and used: ``software``, which the encrypted store holds, or
            ``tpm2``, which only this machine's TPM can use (docs/security.md, keys in hardware).
    """

    store: str
    store_key: str
    counter: str | None = None
    control_socket: str | None = None
    maximum_outbox_bytes: Annotated[int, Meta(ge=4096)] = 64 * 1024 * 1024
    tls_keys: Literal["software", "tpm2"] = "software"


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the wearer allows.

    Args:
        epsilon, delta: budget of a period, over all studies, at record level.
        period_days: length of a period; without it there is one for ever.
        minimum_noise_multiplier: least noise per step that is accepted.
        minimum_cohort: fewest devices an update may be combined with.
        maximum_l2_norm_clip: largest clip that is accepted.
        maximum_local_steps: most steps of training a round; each costs time and battery.
        minimum_helpers: how many helpers have to work together, with the aggregator, to see a single update; from 1 on
            updates are sent masked or not at all. Default 0.
        minimum_operators: of how many different operators; default 0.
        minimum_sum_noise_multiplier: least noise in the sum of the smallest cohort, over what one whole update can
            change in it (device level); default 0.
    """

    epsilon: Epsilon
    delta: Delta
    period_days: Annotated[float, Meta(ge=1, le=36_500)] | None = None
    minimum_noise_multiplier: AtLeastZero = 0.0
    minimum_cohort: Annotated[int, Meta(ge=1)] = 1
    maximum_l2_norm_clip: Annotated[float, Meta(gt=0)] | None = None
    maximum_local_steps: Annotated[int, Meta(ge=1)] | None = None
    minimum_helpers: Annotated[int, Meta(ge=0, le=8)] = 0
    minimum_operators: Annotated[int, Meta(ge=0, le=8)] = 0
    minimum_sum_noise_multiplier: AtLeastZero = 0.0


class EligibilityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """When this device may train; the defaults follow Android's conditions for federated work. A rule whose reading
    the machine does not have (no battery, say) does not hold anything up.

    Args:
        minimum_battery_percent: less charge than this stops training, unless the charger is connected and
            `charging_lifts_battery_floor`.
        charging_lifts_battery_floor: see above.
        require_charging: only while the charger is connected.
        require_idle: only while nobody uses the device.
        require_unmetered: only on a network that is not paid by volume.
        maximum_temperature_celsius: hotter than this stops training.
        windows: times of day, local, such as ``22:00-06:00``, in which it may train; empty for always.
        minimum_new_records: how many records there must be since the device last took part. Whether it takes part then
            depends on them, so the number is compared with noise added, and each comparison is charged.
        new_records_noise: standard deviation of that noise, in records.
        minimum_separation_hours: the least time between participations, whatever a study asks for.
    """

    minimum_battery_percent: Percent = 30.0
    charging_lifts_battery_floor: bool = False
    require_charging: bool = False
    require_idle: bool = True
    require_unmetered: bool = True
    maximum_temperature_celsius: float = 45.0
    windows: tuple[str, ...] = ()
    minimum_new_records: Annotated[int, Meta(ge=0)] = 0
    new_records_noise: Annotated[float, Meta(ge=1)] = 50.0
    minimum_separation_hours: AtLeastZero = 0.0

    def __post_init__(self) -> None:
        for text in self.windows:
            try:
                parse_window(text)
            except LocalMisuseError as error:
                raise ValueError(f"windows: {error}") from error


class BoardConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the readings come from.

    Args:
        battery: name of a supply in ``/sys/class/power_supply``, ``auto`` for the first battery, ``none``.
        thermal_zone: name of a zone in ``/sys/class/thermal``, ``auto`` for the hottest, ``none``.
        network: ``auto`` asks NetworkManager whether the connection is metered; or a fixed answer.
        idle: ``auto`` compares the load with `idle_load`; or a fixed answer.
        idle_load: one-minute load average per core below which the machine is idle.
    """

    battery: str = "auto"
    thermal_zone: str = "auto"
    network: Literal["auto", "metered", "unmetered"] = "auto"
    idle: Literal["auto", "idle", "busy"] = "auto"
    idle_load: AtLeastZero = 0.5


class RecordsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The wearer's recordings.

    Args:
        maximum_count: records kept per stream; the oldest go first.
        maximum_age_days: how long a record is kept.
        held_out_fraction: records that are never trained on, to measure models with.
        ingest_socket: Unix socket that takes recordings, relative to this file; none by default.
        ingest_group: group whose members may write to it; otherwise the device's own user only.
    """

    maximum_count: Annotated[int, Meta(ge=1)] = 20_000
    maximum_age_days: Annotated[float, Meta(gt=0)] = 365.0
    held_out_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    ingest_socket: str | None = None
    ingest_group: str | None = None


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole ``device.toml``. Until it joins a study there may be none; nothing runs then."""

    device: DeviceSection
    privacy: PrivacyConfig
    studies: tuple[StudyConfig, ...] = msgspec.field(name="study", default=())
    eligibility: EligibilityConfig = EligibilityConfig()
    board: BoardConfig = BoardConfig()
    records: RecordsConfig = RecordsConfig()

    def __post_init__(self) -> None:
        names = [study.study for study in self.studies]
        if len(set(names)) < len(names):
            raise ValueError(f"study: expected each tenant and task once, got {', '.join(names)}")

    def study_named(self, name: str | None) -> StudyConfig:
        """The study ``tenant/task``, or the only one of a task; with None the only one there is. Raises ConfigError."""
        if not self.studies:
            raise ConfigError("this device is in no study yet: join one with covey-device enroll")
        found = [study for study in self.studies if name in {None, study.study, study.task}]
        if len(found) != 1:
            known = ", ".join(study.study for study in self.studies)
            raise ConfigError(f"study {name}: expected one of {known}" if name else f"expected a study, one of {known}")
        return found[0]
