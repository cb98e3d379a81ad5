"""The device's configuration file (TOML), decoded strictly; every key is documented here."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fl_protocol.adapters.config_files import BrokerConfig
from fl_protocol.topics import NAME_PATTERN

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]


class StudyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The study this device belongs to, and what it is pinned to.

    Args:
        tenant, task: names on the wire.
        bundle: path of the model bundle (``*.covey``).
        publisher_key: Ed25519 key of the bundle's publisher, 64 hex digits.
        aggregator_key: Ed25519 key that signs manifests and receipts, 64 hex digits.
        minimum_bundle_version: refuse an older bundle.
    """

    tenant: Name
    task: Name
    bundle: str
    publisher_key: str
    aggregator_key: str
    minimum_bundle_version: int = 0


class DeviceSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """This device.

    Args:
        id: pseudonym on the wire; also the certificate's common name.
        store: folder of the encrypted store.
        store_key: file with the store's 32-byte key, readable by its owner only.
        role: ``train``, or ``evaluate`` to only measure each global model on the device's own records.
    """

    id: Name
    store: str
    store_key: str
    role: Literal["train", "evaluate"] = "train"


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the wearer allows.

    Args:
        epsilon, delta: budget for everything this device ever releases, at record level.
        minimum_noise_multiplier: least noise per step that is accepted.
        minimum_cohort: fewest devices an update may be combined with.
    """

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    minimum_noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    minimum_cohort: Annotated[int, Meta(ge=1)] = 1


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole ``device.toml``."""

    study: StudyConfig
    device: DeviceSection
    broker: BrokerConfig
    privacy: PrivacyConfig
